"""Fine-tuning on data unlike that of the pretraining: what a GroupNorm network should start from.

    python benchmarks/far_data.py --data ../shared/data --images 1000 [--networks resnet20 depthwise]
        [--shifts none negative faint digits] [--repairs none moments balance refit] [--groups 4] [--lr 1e-3]
        [--seeds 0]

Networks trained on CIFAR-10 with BatchNorm go on with its images as they are, as negatives, at a fifth of their
contrast with noise, and with handwritten digits: BN and frozen BN as they are, GN folded and repaired on 256 of the new
images, by each method of `calibrate` or not at all. Prints the distance that `calibrate` tells between the images and
the running statistics, and the accuracy on new test images after one epoch, mean over the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accuracy import accuracy, images
from calibration import network as network_named
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.demo import digits

SHIFTS = ("none", "negative", "faint", "digits")
REPAIRS = ("none", "moments", "balance", "refit")
CALIBRATED_ON, TESTED_ON = 256, 1000
Pair = tuple[Tensor, Tensor]


def shifted(shift: str, data: Path, count: int) -> tuple[Pair, Pair]:
    """Training and test images `(N, 3, 32, 32)` with their labels."""
    if shift == "digits":
        parts = digits.split()
        pairs = [(F.interpolate(p.images.expand(-1, 3, -1, -1), 32, mode="bilinear"), p.labels) for p in parts]
    else:
        pairs = [images(data / "cifar10" / part) for part in ("train", "test")]
    chosen = []
    for number, ((x, y), most) in enumerate(zip(pairs, (count, TESTED_ON), strict=True)):
        draw = torch.Generator().manual_seed(number)
        order = torch.randperm(len(x), generator=draw)[:most]
        x, y = x[order], y[order]
        if shift == "negative":
            x = -x
        if shift == "faint":
            x = 0.2 * x + 0.1 * torch.randn(x.shape, generator=draw)
        chosen.append((x, y))
    return chosen[0], chosen[1]


def start(original: nn.Module, column: str, groups: int, train: Tensor, seed: int) -> tuple[nn.Module, float | None]:
    """The network to train, and the distance that calibrating it told."""
    if column in ("bn", "frozen"):
        return normswap.convert(original, rules={"*": "keep"} if column == "bn" else {"*": "frozen"}), None
    model = normswap.convert(original, "gn", groups=groups, eps="auto")
    method = column.removeprefix("gn, ")
    if method == "none":
        return model, None
    chosen = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:CALIBRATED_ON]]
    report = normswap.calibrate(model, original, chosen, method=method, progress=False)
    return model, report.distance


def measured(
    original: nn.Module, column: str, train: Pair, test: Pair, lr: float, options: argparse.Namespace
) -> tuple[float, float | None]:
    """The accuracy after training, mean over the seeds, and the distance that calibrating told."""
    scores, distance = [], None
    for seed in options.seeds:
        model, distance = start(original, column, options.groups, train[0], seed)
        normswap.finetune(model, train, device="cpu", batch_size=options.batch, epochs=1, lr=lr, seed=seed)
        scores.append(accuracy(model.eval(), *test))
    return sum(scores) / len(scores), distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "depthwise"])
    parser.add_argument("--shifts", nargs="+", choices=SHIFTS, default=SHIFTS)
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=REPAIRS)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["bn", "frozen", *(f"gn, {repair}" for repair in options.repairs)]
    print("| network | images | distance | rate | " + " | ".join(columns) + " |")
    print("|---|---|---:" + "|---:" * (1 + len(columns)) + "|")
    for name in options.networks:
        original = network_named(name, options.data).eval()
        for shift in options.shifts:
            sets = shifted(shift, options.data, options.images)
            for lr in options.lr:
                found = [measured(original, column, *sets, lr, options) for column in columns]
                told = next((f"{distance:.2f}" for _, distance in found if distance is not None), "")
                row = " | ".join(f"{score:.3f}" for score, _ in found)
                print(f"| {name} | {shift} | {told} | {lr:g} | {row} |", flush=True)


if __name__ == "__main__":
    main()
