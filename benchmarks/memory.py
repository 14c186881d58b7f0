"""What a recorded run, `inspect`, the self-check and `calibrate` hold, against a plain forward pass.

    python benchmarks/memory.py [--size 160]

Counts the bytes of tensors that operations make and that live at once (see tests/memory.py), weights left out; no
image and no weights are needed. `wasteful` makes thirty temporaries behind each of its two convolutions. For
`calibrate` (4 images, one at a time) `between` is what plain forward passes of all images hold while they stand at
the norm where that is most, which no way of waiting there can avoid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50

import normswap
from normswap.calibration import matching
from normswap.calibration.calibrate import calibrate
from normswap.calibration.footprint import footprint
from normswap.conversion.bound import bind
from normswap.conversion.self_check import prove, reference_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from memory import Held, Wasteful, peak

IMAGES = 4


def calibration(model: nn.Module, reference: nn.Module, x: Tensor, method: str) -> int:
    """The peak over all threads of the lockstep."""
    held, context = Held(), matching.thread_context(model)

    @contextmanager
    def watched() -> Iterator[None]:
        with context(), held:
            yield

    usual = matching.thread_context
    matching.thread_context = lambda model: watched
    try:
        with held:
            calibrate(model, reference, x, batch_size=1, method=method)
    finally:
        matching.thread_context = usual
    return held.peak


def self_check(model: nn.Module, x: Tensor) -> int:
    """Both of its runs, without the copy of the network that the conversion makes."""
    gn = normswap.convert(model, "gn", groups=2, check=False)
    plan = gn._normswap.plan
    return peak(lambda: prove(gn, bind(model, plan), reference_of(model, plan, (x,)), model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=160)
    size = parser.parse_args().size
    torch.manual_seed(0)
    networks = {"wasteful": Wasteful(), "ResNet-50": resnet50(weights=None), "MobileNetV2": mobilenet_v2(weights=None)}
    print(f"{size} x {size} pixels, one image\n")
    print("| network | plain, MB | inspect | self-check | between, MB | calibrate - between | refit - between |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, model in networks.items():
        x = torch.randn(IMAGES, 3, size, size)
        model.train()(x)
        model.eval()
        with torch.no_grad():
            one = footprint(model, (x[:1],), [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
            plain = peak(partial(model, x[:1]))
            shares = [peak(partial(normswap.inspect, model, x[:1])) / plain, self_check(model, x[:1]) / plain]
        cells = [f"{plain / 1e6:.1f}", *(f"{share:.2f}" for share in shares), f"{IMAGES * one.kept / 1e6:.1f}"]
        for method, times in (("balance", 1), ("refit", 3)):
            gn = normswap.convert(model, "gn", groups=2)
            held = calibration(gn, model, x, method)
            cells.append(f"{(held - times * IMAGES * one.kept) / plain:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
