"""From GroupNorm and InstanceNorm back to fixed maps: accuracy, tiles, and speed on a CPU.

    python benchmarks/way_back.py --data ../shared/data [--networks resnet20-gn depthwise-gn resnet20-in] [--to fused]

The networks are those of small_networks.py that never had a BatchNorm; they are trained first (some minutes each) and
kept in build/. `--data` is as for accuracy.py. Each is converted and calibrated on 256 of its training images, with
`--methods`, mean over `--seeds` draws of them; "distil" refits and then distils on all training images, once. Prints
top-1 accuracy on the test images before and after, how far the features of a tile are from those of the whole image
where the border cannot be seen, and the time of a forward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from accuracy import accuracy, images
from calibration import drawn, network
from torch import Tensor, nn

import normswap

STEPS = 600


def converted(model: nn.Module, to: str, method: str, x: Tensor, seed: int) -> nn.Module:
    own = drawn(x, seed)
    made = normswap.convert(model, to, missing_statistics="later", example_inputs=own[:2])
    normswap.calibrate(made, model, own, method="refit" if method == "distil" else method, progress=False)
    if method == "distil":
        normswap.distil(made, model, x, steps=STEPS, progress=False)
    return made.eval()


@torch.no_grad()
def tile_gap(model: nn.Module, x: Tensor) -> float:
    """Relative difference of the features of the middle of a mosaic of 100 images, of it whole and of it cut out."""
    found: list[Tensor] = []
    last = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]
    handle = last.register_forward_hook(lambda module, args, out: found.append(out))
    whole = torch.cat([torch.cat(list(row), 2) for row in x[:100].split(10)], 1)[None]  # 320 x 320
    try:
        model(whole)
        model(whole[..., 32:288, 32:288])
    finally:
        handle.remove()
    side = found[0].shape[-1]
    ratio, edge = 320 // side, 3 * side // 8  # of the whole: the receptive field ends well inside the tile
    skip = edge - 32 // ratio
    a = found[0][..., edge : side - edge, edge : side - edge]
    b = found[1][..., skip : found[1].shape[-1] - skip, skip : found[1].shape[-1] - skip]
    return float((a - b).norm() / a.norm())


@torch.no_grad()
def seconds(models: list[nn.Module], x: Tensor, rounds: int = 30) -> list[float]:
    """The median time of a forward pass of each, taken in turns."""
    times: list[list[float]] = [[] for _ in models]
    for i in range(rounds + 3):
        for model, kept in zip(models, times, strict=True):
            start = time.perf_counter()
            model(x)
            if i > 2:
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=["resnet20-gn", "depthwise-gn", "resnet20-in"])
    parser.add_argument("--to", nargs="+", default=["fused"])
    parser.add_argument("--methods", nargs="+", default=["moments", "refit", "distil"])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, _ = images(args.data / "cifar10" / "train")
    test = images(args.data / "cifar10" / "test")
    print("| network | to | method | accuracy | tile against whole | ms for 16 images |")
    print("|---|---|---|---:|---:|---:|")
    for name in args.networks:
        model = network(name, args.data)
        made = {}
        for to in args.to:
            for method in args.methods:
                seeds = range(1 if method == "distil" else args.seeds)
                each = [converted(model, to, method, x, seed) for seed in seeds]
                made[to, method] = each[0], statistics.mean(accuracy(one, *test) for one in each)
        times = seconds([model, *(one for one, _ in made.values())], x[:16])
        print(f"| {name} | - | - | {accuracy(model, *test):.3f} | {tile_gap(model, x):.2g} | {times[0] * 1e3:.1f} |")
        for ((to, method), (one, score)), took in zip(made.items(), times[1:], strict=True):
            print(f"| {name} | {to} | {method} | {score:.3f} | {tile_gap(one, x):.2g} | {took * 1e3:.1f} |", flush=True)


if __name__ == "__main__":
    main()
