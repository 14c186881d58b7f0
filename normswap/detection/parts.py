"""What a torchvision detector is made of beside its backbone's body: a pyramid, anchors, heads, with a norm in them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSDHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ..errors import Fix, OptionError, Text
from ..norms.registry import build, norm_named, specs
from ..norms.spec import DoesNotFit, NormRequest, NormState
from .backbones import Level, NormLayer, PyramidBackbone, ShrinkingBackbone, body_of, is_complete, levels_of

TWO_STAGES = ("fasterrcnn", "maskrcnn", "keypointrcnn")
PAPER_GROUPS = 32
_POOLED = "pool"  # torchvision's name of the map that only the region proposals see


def parts_of(
    kind: str, backbone: nn.Module, num_classes: int, norm_layer: NormLayer | None, sizes: Sequence[int] | None,
    width: int, image: tuple[int, int],
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the torchvision class: the backbone with its pyramid, anchors, and heads.

    sizes: the sides of the anchors in pixels, one for each map. image: height and width that SSD resizes to.
    """
    whole = backbone
    if not is_complete(backbone):
        finest = 4 if kind in TWO_STAGES else 8
        body, levels = body_of(backbone, finest)
        if kind == "ssd":
            whole = ShrinkingBackbone(body, levels, norm_layer, width, max(image))
        else:
            extra = LastLevelMaxPool() if kind in TWO_STAGES else LastLevelP6P7(width, width)
            whole = PyramidBackbone(body, levels, norm_layer, extra, width)
    levels = levels_of(whole)
    if kind == "ssd":
        return {"backbone": whole, **_ssd_parts(levels, num_classes, sizes, image)}
    make = _two_stage_parts if kind in TWO_STAGES else _one_stage_parts
    return {"backbone": whole, **make(kind, levels, num_classes, norm_layer, sizes, width)}


def norm_layer_of(norm: str | None, groups: int | str | None, width: int) -> NormLayer | None:
    """What makes a fresh norm for a number of channels; known to work for `width`, that of pyramid and heads."""
    if norm is None or norm == "none":
        if groups is not None:
            raise OptionError(f"groups apply to {_grouped()} only")
        return None
    spec = norm_named(norm)
    if spec.fixed:
        raise OptionError(
            Text("new layers have no statistics to freeze, so ", Fix("norm", norm), " makes no sense for them"),
            hint=Text("Give the backbone alone frozen norms, and ", Fix("norm", "gn"), " or None here."),
        )
    if groups is not None and not spec.takes_groups:
        raise OptionError(f"groups apply to {_grouped()} only, not to {norm}")
    request = NormRequest(PAPER_GROUPS if spec.takes_groups and groups is None else groups)

    def layer(channels: int) -> nn.Module:
        state = NormState(
            channels, 1e-5, nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)),
            torch.zeros(channels), torch.ones(channels), torch.zeros((), dtype=torch.long), dims=2,
        )  # fmt: skip
        try:
            return build(spec, state, spec.fit(state, request))
        except DoesNotFit as misfit:
            raise OptionError(f"norm={norm!r} does not fit the detector's own layers: {misfit}") from misfit

    layer(width)
    return layer


def _grouped() -> str:
    return " and ".join(spec.name for spec in specs() if spec.takes_groups)


def _two_stage_parts(
    kind: str, levels: Sequence[Level], num_classes: int, norm_layer: NormLayer | None, sizes: Sequence[int] | None,
    width: int,
) -> dict[str, Any]:  # fmt: skip
    anchors = [(size,) for size in _sizes(levels, sizes, 8)]
    maps = [level.name for level in levels if level.name != _POOLED]
    channels = levels[0].channels
    pool = partial(MultiScaleRoIAlign, featmap_names=maps, sampling_ratio=2)
    parts: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(tuple(anchors), ((0.5, 1.0, 2.0),) * len(anchors)),
        "box_roi_pool": pool(output_size=7),
    }
    if norm_layer is not None:
        parts["box_head"] = FastRCNNConvFCHead((channels, 7, 7), [width] * 4, [1024], norm_layer=norm_layer)
    if kind == "maskrcnn":
        parts["mask_roi_pool"] = pool(output_size=14)
        parts["mask_head"] = MaskRCNNHeads(channels, [256] * 4, 1, norm_layer=norm_layer)
    if kind == "keypointrcnn":
        parts["keypoint_roi_pool"] = pool(output_size=14)
        parts["keypoint_head"] = MaskRCNNHeads(channels, [512] * 8, 1, norm_layer=norm_layer)  # the same, but deeper
    return parts


def _one_stage_parts(
    kind: str, levels: Sequence[Level], num_classes: int, norm_layer: NormLayer | None, sizes: Sequence[int] | None,
    width: int,
) -> dict[str, Any]:  # fmt: skip
    channels = levels[0].channels
    if kind == "fcos":
        if sizes is not None:
            raise OptionError("fcos has no anchors, so anchor_sizes does not go with it")
        points = tuple((level.stride,) for level in levels)
        head = FCOSHead(PAPER_GROUPS, 1, num_classes)  # its own layers, replaced at once, need channels in 32 groups
        layer = norm_layer or _no_norm
        head.classification_head = FCOSClassificationHead(channels, 1, num_classes, norm_layer=layer)
        head.regression_head = FCOSRegressionHead(channels, 1, norm_layer=layer)
        return {"anchor_generator": AnchorGenerator(points, ((1.0,),) * len(levels)), "head": head}
    octaves = tuple(tuple(int(s * 2 ** (i / 3)) for i in range(3)) for s in _sizes(levels, sizes, 4))
    generator = AnchorGenerator(octaves, ((0.5, 1.0, 2.0),) * len(octaves))
    return {
        "anchor_generator": generator,
        "head": RetinaNetHead(channels, generator.num_anchors_per_location()[0], num_classes, norm_layer=norm_layer),
    }


def _sizes(levels: Sequence[Level], given: Sequence[int] | None, strides: int) -> list[int]:
    if given is None:
        return [strides * level.stride for level in levels]
    if len(given) != len(levels) or not all(isinstance(s, int) and s > 0 for s in given):
        at = ", ".join(str(level.stride) for level in levels)
        raise OptionError(f"anchor_sizes must be {len(levels)} positive integers, for strides {at}; got {given!r}")
    return list(given)


def _no_norm(channels: int) -> nn.Module:
    return nn.Identity()


def _ssd_parts(
    levels: Sequence[Level], num_classes: int, sizes: Sequence[int] | None, image: tuple[int, int]
) -> dict[str, Any]:
    """Anchors of Liu et al. 2016, section 2.2: more shapes on the maps in the middle."""
    middle = range(1, len(levels) - 2)
    ratios = [[2, 3] if i in middle else [2] for i in range(len(levels))]
    scales = None if sizes is None else [side / max(image) for side in _sizes(levels, sizes, 0)] + [1.0]
    generator = DefaultBoxGenerator(ratios, scales=scales)
    head = SSDHead([level.channels for level in levels], generator.num_anchors_per_location(), num_classes)
    return {"anchor_generator": generator, "head": head, "size": image[::-1]}
