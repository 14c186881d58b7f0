"""What 256 unlabelled images give back: accuracy of GroupNorm networks calibrated in several ways, and the cost.

    python benchmarks/calibration.py --data ../shared/data [--network resnet20|depthwise|bottleneck] [--groups 1 2 ...]

`--data` is a folder with `resnet20-cifar10.th` (akamaster/pytorch_resnet_cifar10) and `cifar10/{train,test}/<class>/*`.
Mean over three draws of the images. `depthwise` and `bottleneck` are trained first (see small_networks.py) and kept
in build/. `--cost` measures, in processes of their own, the CPU time of `calibrate` against one forward pass of the
original and one of the converted network over the same images, and peak memory against that of the plain passes.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accuracy import accuracy, images
from small_networks import trained
from torch import Tensor, nn

import normswap
from normswap.sources.weights import load_state, read_state

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from resnet20 import resnet20

METHODS = {
    "moments": {"method": "moments"},
    "moments, ε 1": {"method": "moments", "eps": 1.0},
    "balance, ε kept": {"method": "balance", "eps": 0.0},
    "balance, ε 1": {"method": "balance", "eps": 1.0},
    "balance, ε 4": {"method": "balance", "eps": 4.0},
    "refit, ε 1": {"method": "refit", "eps": 1.0},
    "refit, ε 4": {"method": "refit", "eps": 4.0},
}
IMAGES = 256


def network(name: str, data: Path) -> nn.Module:
    model = resnet20()
    load_state(model, read_state(data / "resnet20-cifar10.th"), "resnet20-cifar10.th")
    model.eval()
    return (
        model
        if name == "resnet20"
        else trained(name, model, *images(data / "cifar10" / "train"), Path(f"build/{name}.pt"))
    )


def drawn(x: Tensor, seed: int) -> Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:IMAGES]]


def table(name: str, data: Path, groups: list[int], seeds: int, names: list[str]) -> None:
    model = network(name, data)
    x, y = images(data / "cifar10" / "test")
    unlabelled, _ = images(data / "cifar10" / "train")
    print(f"{name}, BatchNorm itself: {accuracy(model, x, y):.3f}\n")
    print("| groups | γ, β copied | fold | fold, ε 1 | " + " | ".join(names) + " |")
    print("|---:" * (4 + len(names)) + "|", flush=True)
    for count in groups:
        options = {"groups": count, "indivisible": "nearest"}
        scores = [accuracy(normswap.convert(model, "gn", transfer="copy", **options), x, y)]
        folded = normswap.convert(model, "gn", **options)
        scores += [accuracy(each, x, y) for each in (folded, normswap.convert(model, "gn", eps="auto", **options))]
        for method in (METHODS[each] for each in names):
            results = []
            for seed in range(seeds):
                repaired = copy.deepcopy(folded)
                normswap.calibrate(repaired, model, drawn(unlabelled, seed), **method)
                results.append(accuracy(repaired, x, y))
            scores.append(sum(results) / seeds)
        print(f"| {count} | " + " | ".join(f"{score:.3f}" for score in scores) + " |", flush=True)


def cost(name: str, data: Path) -> None:
    """CPU time: the best of five, alternating. Memory: each in a process of its own, above what it held before."""
    torch.set_num_threads(1)
    for batch in (64, IMAGES):
        runs = jobs(name, data, batch)
        best = {}
        for _ in range(5):
            for kind, run in runs.items():
                start = time.process_time()
                run()
                best[kind] = min(best.get(kind, float("inf")), time.process_time() - start)
        command = [sys.executable, __file__, "--data", str(data), "--network", name, "--batch", str(batch), "--job"]
        peak = {
            kind: float(subprocess.run([*command, kind], check=True, capture_output=True, text=True).stdout)
            for kind in runs
        }
        for kind in ("calibrate", "refit"):
            seconds, memory = best[kind] / best["plain"], peak[kind] / peak["plain"]
            whole = peak[kind] / peak["whole"]
            print(f"{name}, {kind}, batches of {batch}: CPU time {seconds:.2f} of the two plain passes; peak memory "
                  f"{memory:.2f} of theirs, {whole:.2f} of one pass over all images at once", flush=True)  # fmt: skip


def jobs(name: str, data: Path, batch: int) -> dict[str, Callable[[], object]]:
    model = network(name, data)
    x = drawn(images(data / "cifar10" / "train")[0], 0).contiguous()
    folded = normswap.convert(model, "gn", groups=4)
    copies = [copy.deepcopy(folded) for _ in range(10)]  # balancing happens once in a network's life

    @torch.no_grad()
    def plain(size: int) -> None:
        for each in (model, folded):
            for part in x.split(size):
                each(part)

    return {
        "plain": lambda: plain(batch),
        "whole": lambda: plain(IMAGES),
        "calibrate": lambda: normswap.calibrate(copies.pop(), model, x, batch_size=batch, method="balance"),
        "refit": lambda: normswap.calibrate(copies.pop(), model, x, batch_size=batch, method="refit"),
    }


def job(kind: str, name: str, data: Path, batch: int) -> None:
    """Print by how many KiB the resident memory grows at most (Linux)."""
    torch.set_num_threads(1)
    run = jobs(name, data, batch)[kind]
    jobs(name, data, 1)["plain"]()  # what torch sets up once
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=("resnet20", "depthwise", "bottleneck"), default="resnet20")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--job", choices=("plain", "whole", "calibrate", "refit"), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=64, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job(options.job, options.network, options.data, options.batch)
    elif options.cost:
        cost(options.network, options.data)
    else:
        table(options.network, options.data, options.groups, options.seeds, options.methods)


if __name__ == "__main__":
    main()
