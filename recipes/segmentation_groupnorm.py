"""Train a small segmentation network from scratch at batch sizes 1 and 2: BatchNorm and GroupNorm.

Goal:      a class for each pixel, learned from one or two images at a time; mean IoU, curves and example pictures
Command:   python recipes/segmentation_groupnorm.py [--data FOLDER]
Time:      about 2.5 minutes on one CPU core for the shapes
Expected:  600 images of coloured shapes, twice: mean IoU at batch 1 0.339 with BatchNorm and 0.491 with GroupNorm, at
           batch 2 0.353 and 0.574; curves.png and examples in runs/segmentation_groupnorm/NORM-BATCH
"""

import argparse
import copy
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import normswap
from normswap.data import Preprocess, open_masks, write_shapes

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, help="folder with train/ and val/, each with images/NAME.* and masks/NAME.png")
parser.add_argument("--size", type=int, default=64, help="of the images' shorter side, in pixels")
parser.add_argument("--groups", type=int, default=8, help="of each GroupNorm layer")
parser.add_argument("--batch", type=int, nargs="+", default=[1, 2])
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--output", type=Path, default=Path("runs/segmentation_groupnorm"))
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
options = parser.parse_args()


class Net(nn.Module):
    """`(N, 3, H, W)` images to `(N, classes, H, W)` scores: down to an eighth of the size and up again (U-Net)."""

    def __init__(self, classes):
        super().__init__()
        widths = [16, 32, 64, 64]
        self.stem = unit(3, widths[0])
        self.down = nn.ModuleList(nn.Sequential(unit(i, o, 2), unit(o, o)) for i, o in pairwise(widths))
        self.up = nn.ModuleList(unit(i + o, i) for i, o in pairwise(widths))
        self.scores = nn.Conv2d(widths[0], classes, 1)

    def forward(self, images):
        maps = [self.stem(images)]
        for down in self.down:
            maps.append(down(maps[-1]))
        x = maps.pop()
        for up in reversed(self.up):
            skipped = maps.pop()
            x = up(torch.cat([skipped, F.interpolate(x, skipped.shape[2:])], 1))
        return self.scores(x)


def unit(inputs, outputs, stride=1):
    """Convolution, norm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


# Images and masks: yours, or circles, squares and triangles on textured noise, drawn once.
count = 4 if options.tiny else 600
folder = options.data or options.output / f"shapes-{count}"
if not options.data:
    torch.set_num_threads(1)  # images of 64x64 pixels are too small to share
if not folder.exists():
    write_shapes(folder / "train", count, options.size)
    write_shapes(folder / "val", max(4, count // 4), options.size, seed=1)
classes = open_masks(folder / "train").count_classes()
length = {"steps": 2} if options.tiny else {"epochs": options.epochs}

# --- The part to copy begins here. ---
# An untrained network has nothing to keep; both start from the same weights.
torch.manual_seed(0)
bn = Net(classes)
gn = normswap.convert(bn, to="gn", groups=options.groups)
for size in options.batch:
    for name, network in (("BatchNorm", bn), ("GroupNorm", gn)):
        report = normswap.finetune(
            copy.deepcopy(network), folder, task="segmentation", batch_size=size, lr=options.lr, **length,
            augment="flip", preprocess=Preprocess(size=options.size),
            output=options.output / f"{name}-{size}", overwrite=True,
        )  # fmt: skip
        # --- The part to copy ends here. ---
        print(f"{name}, batch {size}: mean IoU {report.figures['val_miou']:.4f} after {report.steps} steps")
