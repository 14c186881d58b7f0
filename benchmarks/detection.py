"""mAP of a small Faster R-CNN trained from scratch on coloured shapes, on one CPU core.

    python benchmarks/detection.py [--norm gn] [--batch-size 2] [--steps 1000] [--output FOLDER]

Prints mAP and mAP at IoU 0.5 on 100 held-out images, and the seconds it took. The detector is that of
small_detector.py, for images of 128 x 128 pixels; 1,000 of them to train on. --output keeps the run, with curves.png
and examples.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from small_detector import SIZE, small_detector

import normswap
from normswap.data import shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=["gn", "bn"], default="gn")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    report = normswap.finetune(
        small_detector(options.norm), shapes(options.images, SIZE, seed=0), shapes(100, SIZE, seed=1),
        task="detection", steps=options.steps, batch_size=options.batch_size, lr=options.lr, seed=options.seed,
        device="cpu", output=options.output, overwrite=True,
    )  # fmt: skip
    found = report.figures
    print(f"{options.norm}, batch {options.batch_size}, {report.steps} steps from scratch: mAP {found['val_map']:.3f}, "
          f"mAP@0.5 {found['val_map_50']:.3f}, {report.seconds:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
