"""Accuracy after distillation: ResNet-20 (real CIFAR-10 weights), BN swapped for GroupNorm, images without labels.

    python benchmarks/distillation.py --data ../shared/data [--groups 2 16] [--seeds 0 1 2] [--steps 300]
        [--method balance|refit] [--features 0] [--network resnet20|depthwise|bottleneck]

`--data` is a folder with `resnet20-cifar10.th` (akamaster/pytorch_resnet_cifar10) and `cifar10/{train,test}/<class>/*`.
Prints top-1 accuracy on the test images, mean over the seeds: gamma and beta copied, fold, calibrated on 256 of the
training images, and distilled on all of them; with the range over the seeds, the Kullback-Leibler divergence from the
original then, and the seconds that distilling took. The other networks are those of small_networks.py.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from accuracy import accuracy, images
from calibration import network
from torch import Tensor, nn

import normswap

IMAGES = 256


def scores(
    model: nn.Module,
    groups: int,
    seed: int,
    method: str,
    train: Tensor,
    test: tuple[Tensor, Tensor],
    settings: dict[str, Any],
) -> tuple[float, float, float, float]:
    """Accuracy calibrated and distilled, the divergence from the original, the seconds of distilling."""
    student = normswap.convert(model, "gn", groups=groups, indivisible="nearest")
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    normswap.calibrate(student, model, train[chosen], method=method)
    calibrated = accuracy(student, *test)
    start = time.perf_counter()
    normswap.distil(student, model, train, seed=seed, **settings)
    seconds = time.perf_counter() - start
    return calibrated, accuracy(student, *test), apart(model, student, test[0]), seconds


@torch.no_grad()
def apart(model: nn.Module, student: nn.Module, x: Tensor) -> float:
    """`KL(model || student)`, mean over the images."""
    p, q = (torch.cat([each(part).log_softmax(1) for part in x.split(256)]) for each in (model, student))
    return float((p.exp() * (p - q)).sum(1).mean())


def spread(values: list[float]) -> str:
    """Mean, and the range where there are several."""
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}-{max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--network", choices=("resnet20", "depthwise", "bottleneck"), default="resnet20")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--method", default="balance", help="of calibrate")
    parser.add_argument("--features", type=float, help="weight of the norms' outputs; default: distil's")
    parser.add_argument("--augment", choices=("auto", "flip", "none"), help="default: as distil's")
    options = parser.parse_args()
    model = network(options.network, options.data)
    train, _ = images(options.data / "cifar10" / "train")
    test = images(options.data / "cifar10" / "test")
    settings = {"steps": options.steps, "lr": options.lr, "temperature": options.temperature}
    if options.features is not None:
        settings["features"] = options.features
    if options.augment is not None:
        settings["augment"] = options.augment
    print(f"{options.network}, BatchNorm itself: {accuracy(model, *test):.3f}, on {len(test[1]):,} images.\n")
    print(f"| groups | γ and β copied | fold | + calibrated on {IMAGES} | + {options.steps} steps | KL | seconds |")
    print("|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for groups in options.groups:
        given = {"groups": groups, "indivisible": "nearest"}
        first = [accuracy(normswap.convert(model, "gn", transfer=t, **given), *test) for t in ("copy", "fold")]
        found = [scores(model, groups, seed, options.method, train, test, settings) for seed in options.seeds]
        calibrated, distilled, kl, seconds = ([f[i] for f in found] for i in range(4))
        row = [*(f"{score:.3f}" for score in first), spread(calibrated), spread(distilled)]
        row += [f"{sum(kl) / len(kl):.3f}", f"{max(seconds):.0f}"]
        print(f"| {groups} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
