"""Train with differential privacy (DP-SGD, by opacus) from a BatchNorm network, converted to GroupNorm.

Goal:      fine-tune a public network on private images; DP-SGD refuses BatchNorm, which mixes samples
Command:   python recipes/differential_privacy.py [--epsilon 4]; needs opacus: pip install opacus
Time:      about 45 s on one CPU core
Expected:  accuracy 0.844 at epsilon 3.99, and 0.632 from the layers that opacus's own fix puts in, without γ, β and
           statistics; digits turned by a quarter, delta 1e-4, 20 epochs
"""

import argparse
import copy
import warnings

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.demo import digits
from normswap.demo.network import pretrained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    from opacus import PrivacyEngine
    from opacus.validators import ModuleValidator

BATCH_SIZE = 120
DELTA = 1e-4  # below 1 / images
LR = 1e-3
CLIP = 1.0  # of each sample's gradient

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epsilon", type=float, default=4.0, help="the privacy budget")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--tiny", action="store_true", help="one epoch, to see that it runs")
options = parser.parse_args()
epochs = 1 if options.tiny else options.epochs
torch.set_num_threads(1)  # images of 8x8 pixels are too small to share
warnings.filterwarnings("ignore", module="opacus")  # its advice on secure random numbers, which production wants
warnings.filterwarnings("ignore", message="Full backward hook is firing")

# Public: the network and the digits it was trained on. Private: the same digits turned by a quarter.
training, held_out = digits.split()
private = TensorDataset(training.images.rot90(1, (2, 3)), training.labels)
bn = pretrained()
print(f"BatchNorm: opacus finds {len(ModuleValidator.validate(bn))} layers that it cannot train")
# --- The part to copy begins here. ---
folded = normswap.convert(bn, to="gn", groups=4)
normswap.calibrate(folded, reference=bn, data=training.images)  # public images only
networks = {
    "opacus's fix, GroupNorm from scratch": ModuleValidator.fix(bn),
    "normswap, folded and calibrated": folded,
}

for name, network in networks.items():
    torch.manual_seed(0)
    model = copy.deepcopy(network).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(private, BATCH_SIZE),
        target_epsilon=options.epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=CLIP,
    )
    for _ in range(epochs):
        for images, labels in loader:  # of random sizes (Poisson sampling), which the guarantee needs
            optimizer.zero_grad()
            if len(images):
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()

    model = model._module.eval()  # opacus's wrapper has done its work
    if network is folded:
        normswap.save(model, "differential_privacy.safetensors", overwrite=True)
        model = normswap.load("differential_privacy.safetensors", model=pretrained())
        # --- The part to copy ends here. ---
    with torch.no_grad():
        right = model(held_out.images.rot90(1, (2, 3))).argmax(1) == held_out.labels
    accuracy, spent = right.float().mean().item(), engine.get_epsilon(DELTA)
    print(f"{name}: accuracy {accuracy:.4f} at epsilon {spent:.2f}, delta {DELTA:g}")
