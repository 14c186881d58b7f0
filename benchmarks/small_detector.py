"""A Faster R-CNN small enough to train on one CPU core in minutes; pyramid and heads are 64 wide.

Its backbone is a ResNet of four blocks, or, `depthwise`, a MobileNetV2 (Sandler et al. 2018) of 0.35 times the width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.models.resnet import BasicBlock, ResNet

from normswap import detection

SIZE = 128
GROUPS = 8
FEW = {
    "rpn_batch_size_per_image": 64, "box_batch_size_per_image": 32, "rpn_pre_nms_top_n_train": 200,
    "rpn_post_nms_top_n_train": 100, "rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 50,
}  # fmt: skip


def small_detector(norm: str, num_classes: int = 4, *, depthwise: bool = False) -> nn.Module:
    """With `gn` or `bn` in backbone, pyramid and box head; fresh weights."""
    layer: Any = nn.BatchNorm2d if norm == "bn" else partial(nn.GroupNorm, GROUPS)
    if depthwise:
        backbone: nn.Module = mobilenet_v2(width_mult=0.35, norm_layer=layer)
    else:
        backbone = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=layer)
    return detection.detector(
        "fasterrcnn", backbone=backbone, num_classes=num_classes, norm=norm,
        groups=GROUPS if norm == "gn" else None, width=64, anchor_sizes=(16, 32, 64, 96, 128), min_size=SIZE,
        max_size=SIZE, **FEW,
    )  # fmt: skip
