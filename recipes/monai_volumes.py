"""Convert, calibrate and fine-tune a 3-D U-Net of MONAI, one volume at a time: BatchNorm and GroupNorm.

Goal:      segment volumes, of which a GPU holds one or two, with GroupNorm; its weights were BatchNorm's
Command:   python recipes/monai_volumes.py [--weights unet.pth --batch-size 1]; needs MONAI: pip install monai
Time:      about 30 s on one CPU core
Expected:  Dice before: BatchNorm 0.964, GroupNorm 0.961 as converted and 0.964 calibrated; on volumes of other
           scanners, each with its own contrast, after 150 steps at batch size 1: BatchNorm 0.361, GroupNorm 0.893;
           with --one-scanner, of one contrast for all, which a running mean can follow: 0.928 and 0.922
"""

import argparse
import copy
import warnings
from pathlib import Path

import numpy as np
import torch

import normswap

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    from monai.data import create_test_image_3d
    from monai.losses import DiceCELoss
    from monai.metrics import DiceMetric
    from monai.networks.nets import UNet

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--weights", type=Path, help="state dict of the network below; else it is trained first")
parser.add_argument("--batch-size", type=int, default=1)
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--groups", type=int, default=4, help="of each GroupNorm layer, fewer where channels are few")
parser.add_argument("--one-scanner", action="store_true", help="one contrast for all volumes, not one for each")
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
options = parser.parse_args()
pretraining, steps, count = (2, 2, 4) if options.tiny else (100, options.steps, 60)
SIZE = 32  # voxels of a volume's edge
LR = 5e-3
torch.manual_seed(0)


def volumes(count, seed, noise):
    """Balls in noise: volumes `(N, 1, D, H, W)` from 0 to 1, and where a ball is."""
    random = np.random.RandomState(seed)
    settings = {"num_objs": 6, "rad_max": 7, "rad_min": 3, "num_seg_classes": 1, "noise_max": noise}
    pairs = [create_test_image_3d(SIZE, SIZE, SIZE, random_state=random, **settings) for _ in range(count)]
    return tuple(torch.as_tensor(np.stack(part), dtype=torch.float32)[:, None] for part in zip(*pairs, strict=True))


def rescaled(images):
    """The same by other scanners, or by one, bright where these are dark."""
    scanners = 1 if options.one_scanner else len(images)
    gain, offset = 0.3 + torch.rand(scanners, 1, 1, 1, 1), torch.rand(scanners, 1, 1, 1, 1)
    return offset - gain * images


def trained(network, images, labels, batch_size, steps):
    """The same network, trained with Dice and cross entropy."""
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    network.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch_size,))
        loss = loss_of(network(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def dice(network, images, labels):
    """The mean over volumes of the balls' Dice coefficient, 2|A ∩ B| / (|A| + |B|)."""
    metric = DiceMetric(include_background=False, num_classes=2)
    for part, truth in zip(images.split(4), labels.split(4), strict=True):
        metric(network(part).argmax(1, keepdim=True), truth)
    return metric.aggregate().item()


images, labels = volumes(count, 0, noise=0.2)
test = volumes(max(4, count // 3), 1, noise=0.2)
bn = UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm="batch")
if options.weights:
    bn.load_state_dict(torch.load(options.weights, weights_only=True))
else:
    trained(bn, images, labels, 4, pretraining)
bn.eval()
# --- The part to copy begins here. ---
# The network ends in a norm of two channels: as many groups as fit there.
gn = normswap.convert(bn, to="gn", groups=options.groups, indivisible="nearest")
print(f"as converted: Dice {dice(gn, *test):.4f}")
normswap.calibrate(gn, reference=bn, data=images[:16], progress=False)

# Other scanners: each volume with a contrast and a brightness of its own, and more noise.
other, other_labels = volumes(count, 2, noise=0.5)
other_test, other_test_labels = volumes(len(test[0]), 3, noise=0.5)
if options.one_scanner:
    other, other_test = rescaled(torch.cat([other, other_test])).split([len(other), len(other_test)])
else:
    other, other_test = rescaled(other), rescaled(other_test)
for name, network in (("BatchNorm", bn), ("GroupNorm", gn)):
    torch.manual_seed(0)
    tuned = copy.deepcopy(network)
    with normswap.stabilized(tuned):  # the learning rates of the original network suit the converted one
        trained(tuned, other, other_labels, options.batch_size, steps)
        # --- The part to copy ends here. ---
    print(
        f"{name}: Dice {dice(network, *test):.4f} before, on other volumes "
        f"{dice(network, other_test, other_test_labels):.4f}, and {dice(tuned, other_test, other_test_labels):.4f} "
        f"after {steps} steps at batch size {options.batch_size}"
    )
