"""Swap BatchNorm for GroupNorm and fine-tune both at batch size 2, on the same images in the same order.

Goal:      a classifier that learns from two images at a time: convert, calibrate, fine-tune
Command:   python recipes/groupnorm_at_batch_2.py [--data FOLDER --network FILE.py:FUNCTION --weights FILE]
Time:      about 20 s on one CPU core for the digits, 2 minutes for 4,000 images of CIFAR-10
Expected:  digits turned by a quarter: accuracy 0.725 with BatchNorm, 0.876 with GroupNorm; ResNet-20 on 4,000 JPEG
           images of CIFAR-10 (before: 0.803): 0.799 and 0.842
"""

import argparse
import runpy
from pathlib import Path

import torch

import normswap
from normswap.demo import digits
from normswap.demo.network import pretrained

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, help="folder with train/CLASS/* and val/CLASS/* or test/CLASS/*")
parser.add_argument("--network", help="FILE.py:FUNCTION that builds the network, for --data")
parser.add_argument("--weights", type=Path, help="its state dict")
parser.add_argument("--groups", type=int, default=2, help="of each GroupNorm layer")
parser.add_argument("--steps", type=int, help="default: one pass over the training images")
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
options = parser.parse_args()
if len({bool(given) for given in (options.data, options.network, options.weights)}) > 1:
    parser.error("--data, --network and --weights go together")
if options.data:
    if not Path(options.network.rpartition(":")[0]).is_file():
        parser.error(f"--network {options.network} is not FILE.py:FUNCTION with a file that is there")
    if not options.weights.is_file():
        parser.error(f"--weights {options.weights} is not there")
    if not ((options.data / "train").is_dir() and any((options.data / part).is_dir() for part in ("val", "test"))):
        parser.error(f"--data {options.data} has no folder train, or neither val nor test beside it")

# Labelled images to train and to validate on, images to calibrate on, and a trained BatchNorm network.
if options.data:
    training, held_out = options.data, None  # `finetune` finds its parts, decodes, crops and mirrors
    unlabelled = options.data / "train"
    file, function = options.network.rsplit(":", 1)
    bn = runpy.run_path(file)[function]()
    state = torch.load(options.weights, map_location="cpu", weights_only=True)
    state = {name.removeprefix("module."): value for name, value in state.get("state_dict", state).items()}
    bn.load_state_dict(state)
else:  # handwritten digits, turned by a quarter, which the network of the demo has never seen
    torch.set_num_threads(1)  # images of 8x8 pixels are too small to share
    training, held_out = ((part.images.rot90(1, (2, 3)), part.labels) for part in digits.split())
    unlabelled = digits.split()[0].images
    bn = pretrained()
length = {"steps": 3 if options.tiny else options.steps} if options.tiny or options.steps else {"epochs": 1}

# --- The part to copy begins here. ---
# The statistics go into the convolutions; calibration repairs what groups cost, with some images and no labels.
bn.eval()
gn = normswap.convert(bn, to="gn", groups=options.groups)
print(normswap.calibrate(gn, reference=bn, data=unlabelled))
with_gn = normswap.finetune(gn, training, held_out, batch_size=2, seed=0, **length)  # trains gn itself
# --- The part to copy ends here. ---

with_bn = normswap.finetune(bn, training, held_out, batch_size=2, seed=0, **length)
print("accuracy of   before   after")
for name, report in (("BatchNorm", with_bn), ("GroupNorm", with_gn)):
    before, after = report.before["val_accuracy"], report.figures["val_accuracy"]
    print(f"{name}     {before:.4f}  {after:.4f}  {report.steps} steps")
