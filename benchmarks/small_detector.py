"""A Faster R-CNN small enough to train on one CPU core in minutes: ResNet of four blocks, pyramid and heads 64 wide."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from normswap import detection

SIZE = 128
GROUPS = 8
FEW = {
    "rpn_batch_size_per_image": 64, "box_batch_size_per_image": 32, "rpn_pre_nms_top_n_train": 200,
    "rpn_post_nms_top_n_train": 100, "rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 50,
}  # fmt: skip


def small_detector(norm: str, num_classes: int = 4) -> nn.Module:
    """With `gn` or `bn` in backbone, pyramid and box head; fresh weights."""
    layer: Any = nn.BatchNorm2d if norm == "bn" else partial(nn.GroupNorm, GROUPS)
    return detection.detector(
        "fasterrcnn", backbone=ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=layer), num_classes=num_classes, norm=norm,
        groups=GROUPS if norm == "gn" else None, width=64, anchor_sizes=(16, 32, 64, 96, 128), min_size=SIZE,
        max_size=SIZE, **FEW,
    )  # fmt: skip
