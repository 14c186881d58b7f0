"""Frozen BN side by side: time of forward and forward + backward, and what autograd keeps of the input.

    python benchmarks/frozen.py [--runs 7] [--device cpu]

Input (2, 256, 200, 304) float32, gradient with respect to the input. Goal: forward + backward at most 0.7 times
torchvision's, 0 bytes saved.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from normswap.norms.frozen import FrozenBatchNorm

SHAPE = (2, 256, 200, 304)


def saved_bytes(forward: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes of input-sized tensors that the forward keeps for the backward pass."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size() if tensor.numel() == x.numel() else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward(x)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    x = torch.randn(SHAPE, device=options.device, requires_grad=True)
    gradient = torch.randn_like(x)
    eval_bn = nn.BatchNorm2d(SHAPE[1]).to(options.device).eval().requires_grad_(False)
    jobs: dict[str, Callable[[Tensor], Tensor]] = {
        "torchvision FrozenBatchNorm2d": FrozenBatchNorm2d(SHAPE[1]).to(options.device),
        "nn.BatchNorm2d in eval": eval_bn,
        "normswap FrozenBatchNorm": FrozenBatchNorm(SHAPE[1]).to(options.device),
        "clone (floor)": torch.clone,
    }
    forward: dict[str, list[float]] = {name: [] for name in jobs}
    both: dict[str, list[float]] = {name: [] for name in jobs}

    def now() -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(options.runs + 1):  # the first run of each warms up
        for name, job in jobs.items():
            start = now()
            y = job(x)
            forward[name].append(now() - start)
            y.backward(gradient)
            both[name].append(now() - start)
            x.grad = None
    base = statistics.median(both["torchvision FrozenBatchNorm2d"][1:])
    print(f"torch {torch.__version__}, {options.device}, {SHAPE}, median of {options.runs} runs")
    print("| | forward ms | forward + backward ms | / torchvision | saved MiB |")
    print("|---|---:|---:|---:|---:|")
    for name, job in jobs.items():
        f, b = (statistics.median(times[name][1:]) * 1e3 for times in (forward, both))
        print(f"| {name} | {f:.0f} | {b:.0f} | {b / base / 1e3:.2f} | {saved_bytes(job, x) / 2**20:.0f} |")


if __name__ == "__main__":
    main()
