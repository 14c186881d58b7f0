"""Why learning rates do not carry over from BN to GN: the largest eigenvalue of the training loss's Hessian.

    python benchmarks/curvature.py --data ../shared/data [--groups 2] [--images 64] [--steps 30]

`--data` as in `finetuning.py`. SGD is stable up to a rate of 2 over that eigenvalue. In train mode on `--images`
training images at once, with labels, by power iteration on Hessian-vector products (Pearlmutter 1994), over the weights
of all layers and gamma and beta. `stabilized` is what `finetune` does to the weights; what it does to gradients besides
is not part of the loss, and not in this figure.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accuracy import images
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.sources.weights import load_state, read_state

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from resnet20 import resnet20


def largest_eigenvalue(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> float:
    """Of the Hessian of the mean cross-entropy, the one of largest magnitude."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator) for p in parameters]
    value = 0.0
    for _ in range(steps):
        size = torch.stack([v.square().sum() for v in vector]).sum().sqrt()
        vector = [v / size for v in vector]
        product = torch.autograd.grad(gradients, parameters, grad_outputs=vector, retain_graph=True)
        value = float(sum((p * v).sum() for p, v in zip(product, vector, strict=True)))
        vector = [p.detach() for p in product]
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="of the power iteration")
    options = parser.parse_args()
    original = resnet20().eval()
    load_state(original, read_state(options.data / "resnet20-cifar10.th"), "resnet20-cifar10.th")
    x, y = images(options.data / "cifar10" / "train")
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    some = chosen[: options.images]
    folded = normswap.convert(original, "gn", groups=options.groups)
    calibrated = normswap.convert(original, "gn", groups=options.groups)
    normswap.calibrate(calibrated, original, x[chosen[:256]])
    kept = normswap.convert(original, rules={"*": "keep"})
    frozen = normswap.convert(original, "frozen")
    networks = {
        "BN": (kept, False), "frozen BN": (frozen, False), "GN, folded": (folded, False),
        "GN, calibrated": (calibrated, False), "GN, calibrated, stabilized": (calibrated, True),
    }  # fmt: skip
    print(f"ResNet-20, {options.images} images, {options.groups} groups")
    print("network                       eigenvalue  of BN's")
    first = 0.0
    for name, (model, sized) in networks.items():
        model.train()
        with normswap.stabilized(model) if sized else nullcontext():
            value = largest_eigenvalue(model, x[some], y[some], options.steps)
        first = first or value
        print(f"{name:28}  {value:10.0f}  {value / first:7.1f}", flush=True)


if __name__ == "__main__":
    main()
