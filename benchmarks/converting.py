"""Time converting in memory, side by side with the shortest loop that copies gamma and beta and with peers.

    python benchmarks/converting.py [--runs 7] [--opacus]

Prints milliseconds (median) and the ratios that matter: copy / loop, (fold - fx trace) / loop, and, with a copy of the
model, fold / (deepcopy + in-place fold). All in one run, interleaved.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import fx, nn
from torchvision.models import get_model

import normswap


def shortest_loop(model: nn.Module) -> None:
    """What people write by hand: a GroupNorm with the BN's gamma and beta in its place."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            norm = nn.GroupNorm(1, child.num_features)
            norm.weight.data.copy_(child.weight.data)
            norm.bias.data.copy_(child.bias.data)
            setattr(model, name, norm)
        else:
            shortest_loop(child)


def chain(layers: int) -> nn.Module:
    """A Sequential of `layers` convolutions, each with a BN."""
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))))


def opacus_fix(model: nn.Module) -> None:
    from opacus.validators import ModuleValidator

    ModuleValidator.fix(model)


def milliseconds(work: Callable[[nn.Module], object], original: nn.Module) -> float:
    model = copy.deepcopy(original)
    start = time.perf_counter()
    work(model)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--opacus", action="store_true", help="time ModuleValidator.fix too (slow)")
    options = parser.parse_args()
    settings = {"groups": 1, "inplace": True, "check": False}
    jobs: dict[str, Callable[[nn.Module], object]] = {
        "loop": shortest_loop,
        "sync": nn.SyncBatchNorm.convert_sync_batchnorm,
        "fx trace": fx.symbolic_trace,
        "deepcopy": copy.deepcopy,
        "copy": lambda m: normswap.convert(m, "gn", transfer="copy", **settings),
        "fold": lambda m: normswap.convert(m, "gn", **settings),
        "fold, no undo": lambda m: normswap.convert(m, "gn", undo=False, **settings),
        "fold, new model": lambda m: normswap.convert(m, "gn", groups=1, check=False),
    }
    if options.opacus:
        jobs["opacus"] = opacus_fix
    networks: dict[str, Callable[[], nn.Module]] = {
        "resnet50": lambda: get_model("resnet50", weights=None),
        "resnet152": lambda: get_model("resnet152", weights=None),
        "densenet201": lambda: get_model("densenet201", weights=None),
        "1,000 BN": lambda: chain(1000),
        "10,000 BN": lambda: chain(10000),
    }
    print(f"torch {torch.__version__}, median of {options.runs} runs, ms")
    print("| network | " + " | ".join(jobs) + " | copy/loop | (fold-trace)/loop | no undo | new/(deepcopy+fold) |")
    print("|---|" + "---:|" * (len(jobs) + 4))
    for name, make in networks.items():
        original = make()
        runs = options.runs if "10,000" not in name else max(1, options.runs // 3)
        times: dict[str, list[float]] = {job: [] for job in jobs}
        for _ in range(runs):
            for job, work in jobs.items():
                times[job].append(milliseconds(work, original))
        ms = {job: statistics.median(values) for job, values in times.items()}
        ratios = (
            ms["copy"] / ms["loop"],
            (ms["fold"] - ms["fx trace"]) / ms["loop"],
            (ms["fold, no undo"] - ms["fx trace"]) / ms["loop"],
            ms["fold, new model"] / (ms["deepcopy"] + ms["fold"]),
        )
        cells = [f"{ms[job]:.1f}" for job in jobs] + [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
