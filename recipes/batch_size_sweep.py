"""Fine-tune BatchNorm, frozen BatchNorm and GroupNorm at batch sizes from 1 up, on the same number of images.

Goal:      see from which batch size on each norm learns your data: a table and a picture
Command:   python recipes/batch_size_sweep.py [--data FOLDER --network FILE.py:FUNCTION --weights FILE]
Time:      about 70 s on one CPU core for the digits
Expected:  digits turned by a quarter, accuracy at batch 1, 2, 4, 8, 16, 32 after one pass: BatchNorm 0.221 0.725 0.846
           0.859 0.859 0.794; frozen BatchNorm 0.779 0.809 0.819 0.787 0.749 0.623; GroupNorm 0.864 0.876 0.876 0.874
           0.853 0.811
"""

import argparse
import copy
import runpy
from pathlib import Path

import torch
from matplotlib.figure import Figure

import normswap
from normswap.demo import digits
from normswap.demo.network import pretrained

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, help="folder with train/CLASS/* and val/CLASS/* or test/CLASS/*")
parser.add_argument("--network", help="FILE.py:FUNCTION that builds the network, for --data")
parser.add_argument("--weights", type=Path, help="its state dict")
parser.add_argument("--groups", type=int, default=2, help="of each GroupNorm layer")
parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
parser.add_argument("--images", type=int, help="to learn from, at every batch size; default: each training image once")
parser.add_argument("--output", type=Path, default=Path("batch_size_sweep.png"))
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
batches = [1, 2] if options.tiny else options.batch
images = 4 if options.tiny else options.images

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

# --- The part to copy begins here. ---
bn.eval()
gn = normswap.convert(bn, to="gn", groups=options.groups)
normswap.calibrate(gn, reference=bn, data=unlabelled)
# Frozen as in detectors: running statistics, γ and β.
norms = {"BatchNorm": (bn, False), "frozen BatchNorm": (bn, True), "GroupNorm": (gn, False)}

# The learning rate follows the batch size by default, the same for all norms; the order of the images is one too.
print("accuracy at batch" + "".join(f"{size:8d}" for size in batches))
found = {}
for name, (network, freeze) in norms.items():
    found[name] = []
    for size in batches:
        length = {"steps": max(1, images // size)} if images else {"epochs": 1}
        student = copy.deepcopy(network)
        report = normswap.finetune(
            student, training, held_out, batch_size=size, freeze_stats=freeze, freeze_affine=freeze, seed=0, **length
        )
        found[name].append(report.figures["val_accuracy"])
        # --- The part to copy ends here. ---
    print(f"{name:17s}" + "".join(f"  {accuracy:.4f}" for accuracy in found[name]))

figure = Figure(figsize=(6, 4), layout="constrained")
axes = figure.subplots()
for name, accuracies in found.items():
    axes.plot(batches, accuracies, marker="o", label=name)
axes.set_xscale("log", base=2)
axes.set_xticks(batches, [str(size) for size in batches])
axes.set(xlabel="images in a batch", ylabel="accuracy", title="After equally many images")
axes.legend()
figure.savefig(options.output, dpi=150)
print(f"wrote {options.output}")
