"""Train Faster R-CNN at batch sizes 1 and 2 with frozen BatchNorm, BatchNorm and GroupNorm, from one backbone.

Goal:      detection where batches are tiny: which norm to give backbone, feature pyramid and heads
Command:   python recipes/faster_rcnn_gn_batch_1.py [--images 600]
Time:      about 10 minutes on one CPU core
Expected:  mAP after 600 images, frozen BatchNorm / BatchNorm / GroupNorm, mean of --seed 0, 1, 2: batch 1 0.827 /
           0.680 / 0.763, batch 2 0.798 / 0.678 / 0.712; seeds differ by up to 0.13
"""

import argparse
import copy

import torch
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

import normswap
from normswap.data import shapes
from normswap.detection import detector

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--images", type=int, default=600, help="how many each detector sees in training")
parser.add_argument("--pretraining", type=int, default=200, help="steps of the backbone, of 16 images each")
parser.add_argument("--lr", type=float, default=5e-4, help="largest learning rate at batch size 2")
parser.add_argument("--seed", type=int, default=0, help="of the first weights, the order and the training pictures")
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
options = parser.parse_args()
if options.tiny:
    options.images, options.pretraining = 2, 1
torch.set_num_threads(1)  # maps of this size are too small to share

# Pictures of circles, squares and triangles with their boxes, drawn on demand; others to validate on.
size = 64 if options.tiny else 128
training = shapes(options.images, size, seed=3 * options.seed)
held_out = shapes(2 if options.tiny else 100, size, seed=1)

# A backbone with BatchNorm that learns, from batches that suit it, which shapes a picture holds.
torch.manual_seed(options.seed)
backbone = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
pictures = shapes(16 * options.pretraining, 64, seed=3 * options.seed + 2)
optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-3)
for step in range(options.pretraining):
    batch = [pictures[16 * step + i] for i in range(16)]
    present = torch.stack([F.one_hot(target["labels"] - 1, 3).amax(0) if len(target["labels"]) else torch.zeros(3)
                           for _, target in batch]).float()  # fmt: skip
    loss = F.binary_cross_entropy_with_logits(backbone(torch.stack([image for image, _ in batch])), present)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
backbone.eval()

# --- The part to copy begins here. ---
# The same weights with each norm. New layers of the GroupNorm detector get GroupNorm too, as in Wu and He 2018; those
# of the frozen one get none, as is usual, since they have no statistics to freeze.
images = torch.stack([pictures[i][0] for i in range(min(64, len(pictures)))])
grouped = normswap.convert(backbone, to="gn", groups=8)
print(normswap.calibrate(grouped, reference=backbone, data=images))
fixed = normswap.convert(backbone, to="frozen")
starts = {"frozen": (fixed, None, {}), "BatchNorm": (backbone, "bn", {}), "GroupNorm": (grouped, "gn", {"groups": 8})}

few = {"rpn_batch_size_per_image": 64, "box_batch_size_per_image": 32, "rpn_pre_nms_top_n_train": 200,
       "rpn_post_nms_top_n_train": 100, "rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 50}  # fmt: skip
print("norm        batch  mAP     mAP@0.5  ms a step")
for batch_size in (1, 2):
    for name, (start, norm, more) in starts.items():
        torch.manual_seed(options.seed)
        model = detector(
            "fasterrcnn", backbone=copy.deepcopy(start), num_classes=4, norm=norm, width=64, min_size=size,
            max_size=size, anchor_sizes=(16, 32, 64, 96, 128), **more, **few,
        )  # fmt: skip
        report = normswap.finetune(
            model, training, held_out, task="detection", epochs=1, batch_size=batch_size,
            lr=options.lr * (batch_size / 2) ** 0.5, device="cpu",
            seed=options.seed,
        )  # fmt: skip
        # --- The part to copy ends here. ---
        found = report.figures
        pace = 1000 * batch_size / report.samples_per_second
        print(f"{name:10}  {batch_size:5}  {found['val_map']:.4f}  {found['val_map_50']:.4f}   {pace:.0f}", flush=True)
