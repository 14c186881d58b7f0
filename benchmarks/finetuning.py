"""Fine-tuning at small batches: ResNet-20 (real CIFAR-10 weights) with BN, frozen BN and GroupNorm, equally trained.

    python benchmarks/finetuning.py --data ../shared/data [--batch 2 4 8 16 32] [--epochs 2] [--lr 1e-3 ...] [--seeds 0]
    python benchmarks/finetuning.py --data ../shared/data --optimizer sgd --no-clip --batch 16 --lr 1e-3 3e-3 8e-3
    python benchmarks/finetuning.py --data ../shared/data --norms gn --groups 8 --batch 2 --eps 0 1 4

`--data` is a folder with `resnet20-cifar10.th` (akamaster/pytorch_resnet_cifar10) and `cifar10/{train,test}/<class>/*`.
`--network` is that network or one of small_networks.py, which is trained first and kept in build/. Each network sees
the training images `--epochs` times; GN is folded and calibrated on 256 of them, with each of `--eps`, 0 keeping 1e-5.
Prints the top-1 accuracy on the test images at the end of training, mean over the seeds, and draws it into `--output`.
`gn, plain` is GN without what `finetune` does for converted networks (stabilize=False). `gn, ws` has, in its place,
weight-standardised convolutions (see weight_standardization.py), but for depthwise ones in `gn, ws, dense`.
`--keep FILE` holds what has been measured, one line each, so that an interrupted sweep goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accuracy import accuracy, images
from calibration import network as network_named
from torch import Tensor, nn
from weight_standardization import centre_filters, standardize

import normswap

NORMS = ("bn", "frozen", "gn", "gn, plain", "gn, ws", "gn, ws, dense")
IMAGES = 256


def network(original: nn.Module, norm: str, groups: int, train: Tensor, seed: int, eps: float | None) -> nn.Module:
    """The network to train; BN as it is, GN folded and calibrated."""
    if not norm.startswith("gn"):
        return normswap.convert(original, rules={"*": "keep"} if norm == "bn" else {"*": norm})
    model = normswap.convert(original, "gn", groups=groups)
    standardized = "ws" in norm
    if standardized:
        centre_filters(model, dense="dense" in norm)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    normswap.calibrate(model, original, train[chosen], eps=eps)
    if standardized:
        standardize(model, dense="dense" in norm)
    return model


def trained(
    original: nn.Module, norm: str, groups: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor],
    settings: dict[str, Any], eps: float | None,
) -> float:  # fmt: skip
    model = network(original, norm, groups, train[0], settings["seed"], eps)
    print(f"  {norm}, before training: {accuracy(model.eval(), *test):.3f}", file=sys.stderr)
    try:
        normswap.finetune(model, train, device="cpu", stabilize="ws" not in norm and norm != "gn, plain", **settings)
    except normswap.NormswapError as error:
        print(f"  {norm}: {error.message}", file=sys.stderr)
        return float("nan")
    return accuracy(model.eval(), *test)


class Kept:
    """Accuracies by what they were measured with, in a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.found = {json.dumps(line[0], sort_keys=True): line[1] for line in map(json.loads, lines)}

    def get(self, what: dict[str, Any], measure: Callable[[], float]) -> float:
        key = json.dumps(what, sort_keys=True)
        if key not in self.found:
            self.found[key] = measure()
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps([what, self.found[key]]) + "\n")
        return self.found[key]


def draw(found: dict[tuple[str, int], float], norms: list[str], batches: list[int], before: float, to: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for norm in norms:
        axes.plot(batches, [found[norm, batch] for batch in batches], marker="o", label=norm)
    axes.axhline(before, color="grey", lw=1, ls="--", label="before (BN)")
    axes.set(xscale="log", xlabel="batch size", ylabel="top-1 accuracy", xticks=batches, xticklabels=batches)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(to, dpi=120)


def columns_of(norms: list[str], epses: list[float | None]) -> dict[str, tuple[str, float | None]]:
    """By what stands above it: the norm to train, and the eps that it is calibrated with."""
    return {
        norm if eps is None or not norm.startswith("gn") else f"{norm}, ε {eps or 1e-5:g}": (norm, eps)
        for norm in norms
        for eps in epses
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=["bn", "frozen", "gn"])
    parser.add_argument("--network", choices=("resnet20", "depthwise", "bottleneck"), default="resnet20")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--eps", type=float, nargs="+", default=[None], help="of GN; default: calibrate's own")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--lr", type=float, nargs="+", default=[None], help="default: finetune's own, by the batch")
    parser.add_argument("--no-clip", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--keep", type=Path, help="a JSONL file")
    parser.add_argument("--output", type=Path, help="a PNG with the accuracies over the batch size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    original = network_named(options.network, options.data)
    original.eval()
    train, test = images(options.data / "cifar10" / "train"), images(options.data / "cifar10" / "test")
    before = accuracy(original, *test)
    print(f"BatchNorm before: {before:.3f}, on {len(test[1]):,} images.\n")
    columns = columns_of(options.norms, options.eps)
    print("| batch | learning rate | " + " | ".join(columns) + " |\n" + "|---:" * (2 + len(columns)) + "|")
    found: dict[tuple[str, int], float] = {}
    kept = Kept(options.keep)
    for batch in options.batch:
        for lr in options.lr:
            for column, (norm, eps) in columns.items():
                scores = []
                for seed in options.seeds:
                    settings = {"batch_size": batch, "epochs": options.epochs, "optimizer": options.optimizer, "lr": lr}
                    settings |= {"seed": seed} | ({"clip_grad": None} if options.no_clip else {})
                    run = partial(trained, original, norm, options.groups, train, test, settings, eps)
                    what = {"norm": column, "groups": options.groups, "network": options.network, **settings}
                    scores.append(kept.get(what, run))
                found[column, batch] = sum(scores) / len(scores)
            rate = "default" if lr is None else f"{lr:g}"
            row = " | ".join(f"{found[column, batch]:.3f}" for column in columns)
            print(f"| {batch} | {rate} | {row} |", flush=True)
    if options.output is not None:
        draw(found, list(columns), options.batch, before, options.output)
        print(f"\nDrawn: {options.output}")


if __name__ == "__main__":
    main()
