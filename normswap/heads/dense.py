"""The layers that give the scores of detectors and segmentation networks, and new ones for another number of classes.

They are known by torchvision's names, so that no detector's code need be imported to look.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

_PRIOR = 0.01  # of an object at an anchor, before training (Lin et al. 2017, "Focal Loss", section 4.1)


def find_predictor(model: nn.Module) -> tuple[str, int] | None:
    """The path of the module that holds the class scores, and their number; None where there is none of the known.

    Detectors (Faster, Mask R-CNN: `roi_heads`; RetinaNet, FCOS, SSD: `head`): with the background. Segmentation
    networks of torchvision: the path is "", the network, since an auxiliary classifier goes with the classifier.
    """
    heads: Any = getattr(model, "roi_heads", None)
    if isinstance(getattr(getattr(heads, "box_predictor", None), "cls_score", None), nn.Linear):
        return "roi_heads", heads.box_predictor.cls_score.out_features
    scores: Any = getattr(getattr(model, "head", None), "classification_head", None)
    if isinstance(getattr(scores, "cls_logits", None), nn.Conv2d):
        return "head", scores.num_classes
    if isinstance(getattr(scores, "module_list", None), nn.ModuleList):
        return "head", scores.num_columns
    last = list(_pixel_classifiers(model).values())
    return ("", last[0].out_channels) if last else None


def resize_predictor(module: nn.Module, classes: int) -> bool:
    """Give what `find_predictor` found fresh layers for another number of classes, in place; False for other modules.

    Boxes and masks of two-stage detectors are predicted for each class, so these layers are fresh too. They start as
    torch's layers do, those of one-stage detectors with small weights and a bias towards "nothing here".
    """
    heads: Any = module
    if isinstance(getattr(getattr(heads, "box_predictor", None), "cls_score", None), nn.Linear):
        predictor = heads.box_predictor
        predictor.cls_score = _linear(predictor.cls_score, classes)
        predictor.bbox_pred = _linear(predictor.bbox_pred, 4 * classes)
        masks = getattr(heads, "mask_predictor", None)
        if masks is not None:
            masks.mask_fcn_logits = _convolution(masks.mask_fcn_logits, classes)
        return True
    scores: Any = getattr(heads, "classification_head", None)
    if isinstance(getattr(scores, "cls_logits", None), nn.Conv2d):
        scores.cls_logits = _rare(_convolution(scores.cls_logits, scores.num_anchors * classes))
        scores.num_classes = classes
        return True
    if isinstance(getattr(scores, "module_list", None), nn.ModuleList):
        _resize_columns(scores, classes)
        return True
    last = _pixel_classifiers(module)
    for path, layer in last.items():
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, _convolution(layer, classes))
    return bool(last)


def _resize_columns(scores: Any, classes: int) -> None:
    """SSD: one convolution for each map; in SSDlite it is the last of a block."""
    for i, block in enumerate(scores.module_list):
        layer: Any = block if isinstance(block, nn.Conv2d) else block[-1]
        anchors = layer.out_channels // scores.num_columns
        new = _convolution(layer, anchors * classes)
        if layer is block:
            scores.module_list[i] = new
        else:
            block[-1] = new
    scores.num_columns = classes


def _pixel_classifiers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The last convolutions of torchvision's FCN, DeepLab (`classifier`, `aux_classifier`) and LR-ASPP."""
    if "backbone" not in model._modules or "classifier" not in model._modules:
        return {}
    found: dict[str, Any] = {}
    for part in ("classifier", "aux_classifier"):
        names = [n for n, m in model.named_modules() if n.startswith(f"{part}.") and isinstance(m, nn.Conv2d)]
        both = [n for n in names if n.endswith(("low_classifier", "high_classifier"))]
        found |= {n: model.get_submodule(n) for n in both or names[-1:]}
    return found


def _linear(old: nn.Linear, outputs: int) -> nn.Linear:
    new = nn.Linear(
        old.in_features, outputs, old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
    )  # fmt: skip
    new.train(old.training)
    return new


def _convolution(old: nn.Conv2d, outputs: int) -> nn.Conv2d:
    build: Any = nn.Conv2d  # whose stubs take no tuple of any length
    new: nn.Conv2d = build(
        old.in_channels, outputs, old.kernel_size, old.stride, old.padding, old.dilation,
        bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype,
    )  # fmt: skip
    new.train(old.training)
    return new


@torch.no_grad()
def _rare(layer: nn.Conv2d) -> nn.Conv2d:
    """A focal loss does not begin to learn from scores that find an object everywhere."""
    if layer.weight.is_meta:
        return layer
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, -math.log((1 - _PRIOR) / _PRIOR))
    return layer
