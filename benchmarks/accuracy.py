"""Accuracy without data: ResNet-20 (real CIFAR-10 weights) with its BN swapped for GroupNorm, no image used.

    python benchmarks/accuracy.py --data ../shared/data [--write README.md]

`--data` is a folder with `resnet20-cifar10.th` (akamaster/pytorch_resnet_cifar10) and `cifar10/test/<class>/*`.
Prints top-1 accuracy on the test images for gamma and beta copied, which is what hand-written loops do, and for fold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as T

import normswap
from normswap.sources.weights import load_state, read_state

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from resnet20 import resnet20

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def images(folder: Path) -> tuple[Tensor, Tensor]:
    """All images `(N, 3, 32, 32)`, normalised, and their labels by sorted class folder."""
    files = [(f, label) for label, c in enumerate(sorted(folder.iterdir())) for f in sorted(c.iterdir())]
    pixels = torch.stack([T.to_dtype(T.pil_to_tensor(Image.open(f).convert("RGB")), scale=True) for f, _ in files])
    return T.normalize(pixels, MEAN, STD), torch.tensor([label for _, label in files])


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    logits = torch.cat([model(part) for part in x.split(500)])
    return float((logits.argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--write", type=Path, help="file whose part between accuracy marks is replaced")
    options = parser.parse_args()
    model = resnet20()
    load_state(model, read_state(options.data / "resnet20-cifar10.th"), "resnet20-cifar10.th")
    model.eval()
    x, y = images(options.data / "cifar10" / "test")
    base = accuracy(model, x, y)
    lines = [
        f"BatchNorm itself: {base:.3f}, on {len(y):,} images.",
        "",
        "| groups | γ and β copied | fold |",
        "|---:|---:|---:|",
    ]
    for groups in (1, 2, 4, 8, 16):
        scores = [
            accuracy(normswap.convert(model, "gn", groups=groups, transfer=transfer), x, y)
            for transfer in ("copy", "fold")
        ]
        lines.append(f"| {groups} | " + " | ".join(f"{score:.3f}" for score in scores) + " |")
    print("\n".join(lines))
    if options.write:
        begin, end = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
        page = options.write.read_text()
        head, tail = page.partition(begin)[0], page.partition(end)[2]
        options.write.write_text(f"{head}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{tail}")


if __name__ == "__main__":
    main()
