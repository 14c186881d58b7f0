"""Fine-tune a YOLO detector with ultralytics' own trainer at batch size 2: BatchNorm and GroupNorm.

Goal:      a trained YOLO network goes on with GroupNorm in ultralytics' trainer; on two images at a time, and predicts
Command:   python recipes/ultralytics_trainer.py [--batch-size 2 --epochs 2]; needs ultralytics: pip install ultralytics
Time:      about 1.5 minutes on one CPU core
Expected:  mAP50 on shapes in fog after 2 epochs at batch size 2, one seed: BatchNorm 0.435, GroupNorm 0.428, which is
           level; 0.412 on clear shapes before. With the trainer's own warm-up of biases: 0.510 and 0.008
"""

import argparse
import copy
import logging
import os
from pathlib import Path

import torch
from PIL import Image
from torch import nn

os.environ.setdefault("YOLO_OFFLINE", "true")  # fonts, updates and statistics are not to be had from the network
os.environ.setdefault("YOLO_VERBOSE", "false")

from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

import normswap
from normswap.data import shapes

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--network", default="yolov8n.yaml", help="a file of ultralytics that describes a network")
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--groups", type=int, default=4, help="of each GroupNorm layer")
parser.add_argument("--warmup-bias-lr", type=float, default=0.0, help="when it goes on; ultralytics' default is 0.1")
parser.add_argument("--seed", type=int, default=0, help="of the trainer")
parser.add_argument("--output", type=Path, default=Path("runs/ultralytics_trainer"))
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
options = parser.parse_args()
SIZE = 64  # pixels of an image's side
count, pretraining, epochs = (8, 1, 1) if options.tiny else (200, 20, options.epochs)
output = options.output.resolve()
torch.manual_seed(0)
LOGGER.setLevel(logging.ERROR)


def written(folder, changed):
    """Coloured shapes in the format of YOLO, `changed` or as they are. Returns the file that describes them."""
    for part, number, seed in (("train", count, 0), ("val", max(4, count // 4), 1)):
        data = shapes(number, SIZE, seed=seed)
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        for i, (image, target) in enumerate(data):
            pixels = (changed(image) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / "images" / part / f"{i}.png")
            first, last = target["boxes"].split(2, dim=1)
            rows = torch.cat([(first + last) / 2, last - first], 1) / SIZE  # centre, width and height
            lines = [" ".join(map(str, [int(k) - 1, *r.tolist()])) for k, r in zip(target["labels"], rows, strict=True)]
            (folder / "labels" / part / f"{i}.txt").write_text("\n".join(lines))
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(data.categories))
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return folder / "data.yaml"


def trained(network, data, batch_size, epochs, name, lr, bias_lr=0.0):
    """Trained by ultralytics, which takes a network as it is where it is given one. Returns mAP50 and what it wrote."""
    trainer = DetectionTrainer(
        overrides={
            "model": options.network, "data": str(data), "imgsz": SIZE, "batch": batch_size, "nbs": batch_size,
            "epochs": epochs, "optimizer": "AdamW", "lr0": lr, "warmup_epochs": 0.5,
            "warmup_bias_lr": bias_lr,  # the default, 0.1, is one for SGD; converted convolutions have a bias each
            "mosaic": 0, "scale": 0.2,
            "device": "cpu", "workers": 0, "amp": False, "plots": False, "seed": options.seed, "verbose": False,
            "project": str(output), "name": name, "exist_ok": True,
        }
    )  # fmt: skip
    trainer.model = network
    trainer.train()
    return trainer.metrics["metrics/mAP50(B)"], trainer.best


@torch.no_grad()
def inputs(data, number):
    """Images as the trainer gives them to the network."""
    from torchvision.transforms.functional import to_tensor

    files = sorted((data.parent / "images" / "train").glob("*.png"))[:number]
    return torch.stack([to_tensor(Image.open(file)) for file in files])


clear = written(output / "clear", lambda image: image)
fog = written(output / "fog", lambda image: 0.4 + 0.4 * image.flip(0))  # of little contrast, in other colours
bn = DetectionModel(options.network, nc=3, verbose=False)
before, file = trained(bn, clear, 16, pretraining, "pretrained", 2e-3)
print(f"BatchNorm, trained on shapes: mAP50 {before:.4f}")
bn = YOLO(file).model.float().eval()

# --- The part to copy begins here. ---
gn = normswap.convert(bn, to="gn", groups=options.groups)
normswap.calibrate(gn, reference=bn, data=inputs(clear, 64), progress=False)
for name, network in (("BatchNorm", bn), ("GroupNorm", gn)):
    network = copy.deepcopy(network)
    with normswap.stabilized(network):  # the learning rates of the original network suit the converted one
        figure, file = trained(network, fog, options.batch_size, epochs, name, 5e-4, options.warmup_bias_lr)
    print(f"{name}: mAP50 {figure:.4f} on shapes in fog after {epochs} epochs at batch size {options.batch_size}")
# What the trainer wrote is the converted network, which `predict` leaves as it is: there is nothing to fuse. Its file
# is ultralytics' own; normswap's holds what was swapped for what, and no code.
yolo = YOLO(file)
normswap.save(yolo.model.float(), output / "trained.safetensors", overwrite=True)
yolo.model = normswap.load(output / "trained.safetensors", model=copy.deepcopy(bn))
# --- The part to copy ends here. ---
kinds = [type(layer) for layer in yolo.model.modules()]
print(f"{kinds.count(nn.GroupNorm)} GroupNorm and {kinds.count(nn.BatchNorm2d)} BatchNorm layers were trained")
found = yolo.predict(sorted((fog.parent / "images" / "val").glob("*.png")), imgsz=SIZE, verbose=False)
print(f"GroupNorm: {sum(len(image.boxes) for image in found)} boxes in {len(found)} images")
