"""How well `advise` foretells the drift of a conversion: its estimate from noise beside what real images show.

    python benchmarks/advising.py --data ../shared/data [--networks resnet20 text ...] [--lite0 FOLDER]

Networks are those of `datafree.py` (trained first and kept in build/), `lite0` of them only where its weights are at
hand, and `random:NAME`, a network of torchvision with random weights, gamma and beta, and running statistics estimated
on photographs. Prints the drift of GroupNorm with 1 to 32 groups, expected and measured on 64 images of the network's
own kind, Spearman's rank correlation for each network, and over all of them together. Nothing is fitted to any of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datafree import CIFAR, ZOO, case_of
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as T

import normswap
from normswap.advice.advise import GROUPS
from normswap.advice.drift import bare_norm, expected_drift, noise_for
from normswap.comparison.outputs import OutputTally
from normswap.norms.registry import norm_named
from normswap.norms.spec import NormRequest

RANDOM = ("random:resnet18", "random:mobilenet_v2", "random:densenet121")
IMAGES, SIDE = 64, 96


def network(name: str, data: Path, lite0: Path | None) -> tuple[nn.Module, Tensor]:
    """A network, and images of its own kind."""
    if not name.startswith("random:"):
        case = case_of(name, data, lite0, IMAGES)
        return case.model, case.own[:IMAGES]
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name.partition(":")[2], weights=None)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, -0.1, 0.3)
    files = sorted((data / "imagenet" / "calibrate").glob("*/*.jpg"))[: 2 * IMAGES]
    pixels = [T.resize(T.pil_to_tensor(Image.open(f).convert("RGB")), [SIDE, SIDE], antialias=True) for f in files]
    x = (torch.stack(pixels).float() - 127) / 128
    normswap.estimate_statistics(model, x[IMAGES:], batch_size=32)
    return model.eval(), x[:IMAGES]


def expected(model: nn.Module, x: Tensor) -> list[float]:
    """By the number of groups, from noise of the size of `x`."""
    gn = norm_named("gn")
    layers = [layer for layer in normswap.inspect(model, feeds=False).layers if layer.state.has_statistics]
    swaps = []
    for groups in GROUPS:
        request = NormRequest(groups=groups, indivisible="nearest")
        swaps.append({layer.path: bare_norm(layer, gn, gn.fit(layer.state, request)) for layer in layers})
    noise = noise_for(model, (x[:1],))
    return [float(drift or 0) for drift in expected_drift(model, swaps, noise or ())]


@torch.no_grad()
def measured(model: nn.Module, x: Tensor) -> list[float]:
    """By the number of groups, on the images: the figure that `verify` gives."""
    found = []
    for groups in GROUPS:
        converted = normswap.convert(model, "gn", groups=groups, indivisible="nearest", check=False)
        tally = OutputTally()
        for part in x.split(32):
            tally.add(model(part), converted(part), None)
        total = tally.total()
        found.append(0.0 if total is None else total.relative)
    return found


def spearman(one: list[float], other: list[float]) -> float:
    """Correlation of the ranks."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=[*CIFAR, *ZOO, "lite0", *RANDOM])
    parser.add_argument("--lite0", type=Path)
    options = parser.parse_args()
    both: tuple[list[float], list[float]] = ([], [])
    print("| network | expected | measured | rank correlation |")
    print("|---|---|---|---:|", flush=True)
    for name in options.networks:
        try:
            model, x = network(name, options.data, options.lite0)
        except ImportError as error:
            print(f"| {name} | - | - | left out: {error} |", flush=True)
            continue
        pair = expected(model, x), measured(model, x)
        texts = [" ".join(f"{drift:.2f}" for drift in drifts) for drifts in pair]
        print(f"| {name} | {texts[0]} | {texts[1]} | {spearman(*pair):.2f} |", flush=True)
        for all_of_them, drifts in zip(both, pair, strict=True):
            all_of_them += drifts
    print(f"\nAll {len(both[0])} pairs together: {spearman(*both):.2f}")


if __name__ == "__main__":
    main()
