"""Adapt a network to disturbed images while it is used, image by image, without labels.

Goal:      entropy minimisation at test time (TENT) on a stream of single images; with BatchNorm and with GroupNorm
Command:   python recipes/test_time_adaptation.py [--severity 0.35 --lr 0.002 --images 597]
Time:      about 20 s on one CPU core
Expected:  accuracy on foggy digits, as it is, adapted one by one, adapted in batches of 16: BatchNorm 0.786, 0.117 and
           0.933; GroupNorm 0.804, 0.920 and 0.836
"""

import argparse
import copy

import torch

import normswap
from normswap.demo import digits
from normswap.demo.network import pretrained

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--severity", type=float, default=0.35, help="of fog and noise, 0 for none")
parser.add_argument("--lr", type=float, default=0.002, help="of gamma and beta")
parser.add_argument("--images", type=int, default=597, help="how many of the held-out digits")
parser.add_argument("--tiny", action="store_true", help="a few images, to see that it runs")
options = parser.parse_args()
torch.manual_seed(0)
torch.set_num_threads(1)  # images of 8x8 pixels are too small to share

training, held_out = digits.split()
chosen = held_out[: 20 if options.tiny else options.images]
fog = options.severity * torch.linspace(0, 1, 8).view(1, 1, 1, 8)
images = chosen.images * (1 - options.severity) + fog + 0.3 * options.severity * torch.randn_like(chosen.images)

bn = pretrained().eval()
# --- The part to copy begins here. ---
gn = normswap.convert(bn, to="gn", groups=2)
normswap.calibrate(gn, reference=bn, data=training.images, progress=False)


def adapted(network: torch.nn.Module, batch_size: int) -> float:
    """Accuracy on the stream, each batch answered first and learnt from then (Wang et al. 2021, "Tent")."""
    network = copy.deepcopy(network).requires_grad_(False)
    norms = [layer for layer in network.modules() if isinstance(layer, (torch.nn.BatchNorm2d, torch.nn.GroupNorm))]
    for norm in norms:
        norm.requires_grad_(True)
        if isinstance(norm, torch.nn.BatchNorm2d):  # as Tent has it: the batch's own statistics
            norm.train()
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    optimizer = torch.optim.Adam([p for norm in norms for p in norm.parameters()], lr=options.lr)
    right = 0
    for batch, labels in zip(images.split(batch_size), chosen.labels.split(batch_size), strict=True):
        scores = network(batch)
        right += int((scores.argmax(1) == labels).sum())
        entropy = -(scores.softmax(1) * scores.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        entropy.backward()
        optimizer.step()
        # --- The part to copy ends here. ---
    return right / len(images)


def accuracy(network: torch.nn.Module) -> float:
    with torch.no_grad():
        return float((network(images).argmax(1) == chosen.labels).float().mean())


for name, network in (("BatchNorm", bn), ("GroupNorm", gn)):
    line = f"{name}: accuracy {accuracy(network):.4f} as it is"
    print(line + "".join(f", {adapted(network, size):.4f} adapted with batches of {size}" for size in (1, 16)))
