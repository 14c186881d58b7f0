"""Detectors: convert them part by part, build one on a converted backbone, freeze the first stages of it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torchvision.models import detection as zoo
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from .backbones import Level, NormLayer, PyramidBackbone, body_of, is_complete, levels_of, stages_of
from .conversion import convert as convert_whole
from .errors import OptionError
from .freezing import freeze
from .planning import Rules
from .registry import build, get, identify
from .spec import Misfit, NormState, Request
from .values import whole as check_whole

DETECTORS = {
    "fasterrcnn": zoo.FasterRCNN,
    "maskrcnn": zoo.MaskRCNN,
    "keypointrcnn": zoo.KeypointRCNN,
    "retinanet": zoo.RetinaNet,
    "fcos": zoo.FCOS,
}
PAPER_GROUPS = 32
WIDTH = 256
_TWO_STAGES = ("fasterrcnn", "maskrcnn", "keypointrcnn")
_POOLED = "pool"  # torchvision's name of the map that only the region proposals see
_STAGES = 5


def convert(
    model: nn.Module,
    to: str | None = None,
    *,
    backbone: str | None = None,
    fpn: str | None = None,
    head: str | None = None,
    rules: Rules | None = None,
    **options: Any,
) -> nn.Module:
    """`normswap.convert` with a norm, or "keep", for each part of a detector or segmentation network.

    backbone, fpn, head: what the norms of that part become; `to` is for the parts that are not given, which otherwise
    stay as they are. rules come first; options are those of `normswap.convert`. An eps, such as the 0 of torchvision's
    COCO weights, goes into the fold or, for `frozen`, `bn` and `fused`, stays.

    Raises what `normswap.convert` raises, which for a part without norms is an OptionError.
    """
    parts = {"backbone": backbone, "fpn": fpn, "head": head}
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules or ())
    pairs += [(f"role:{role}", norm) for role, norm in parts.items() if norm is not None]
    return convert_whole(model, to, rules=pairs, **options)


def detector(
    kind: str,
    *,
    backbone: nn.Module,
    num_classes: int,
    norm: str | None = "gn",
    groups: int | str | None = None,
    trainable_layers: int | None = None,
    anchor_sizes: Sequence[int] | None = None,
    width: int = WIDTH,
    **options: Any,
) -> nn.Module:
    """A torchvision detector on a backbone of your own, with a norm in its feature pyramid and its heads.

    kind: `fasterrcnn`, `maskrcnn`, `keypointrcnn`, `retinanet` or `fcos`. num_classes: with the background, as in
    torchvision. backbone: a classifier, converted or not, with `layer1` ... `layer4` or `features`; a timm network made
    with features_only=True; or a module that gives feature maps as a dict, list or tuple. The pyramid goes on its maps
    of stride 4 (one-stage detectors: 8) to 32. A module that gives a dict and has an int `out_channels` is taken as it
    is. Its modules become part of the detector; they are not copied.

    norm: in the pyramid, in the box head (four convolutions and a fully connected layer instead of two of the latter),
    the mask and keypoint heads, and the heads of one-stage detectors, as in Wu and He 2018, "Group Normalization",
    section 4.2; not in the region proposals. None: no norm there. groups: for `gn`, 32 by default, as there.
    trainable_layers: see `freeze_stages`. anchor_sizes: the side of the anchors of each level in pixels, by default
    8 times the stride (`retinanet`: 4 times, each with two steps to the next). width: channels of the pyramid, if
    it is made here, and of the box head. options: those of the torchvision class,
    such as min_size, max_size, box_detections_per_img, num_keypoints.

    Raises OptionError for a kind, norm, number or backbone that does not fit.
    """
    if kind not in DETECTORS:
        raise OptionError(f"unknown kind of detector {kind!r}; known: {', '.join(DETECTORS)}")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise OptionError(f"num_classes counts the background, so it is at least 2, not {num_classes!r}")
    _check_options(kind, options)
    check_whole("width", width)
    norm_layer = _norm_layer(norm, groups, width)
    whole = backbone if is_complete(backbone) else _with_pyramid(kind, backbone, norm_layer, width)
    levels = levels_of(whole)
    parts = _two_stage_parts if kind in _TWO_STAGES else _one_stage_parts
    given = parts(kind, levels, num_classes, norm_layer, anchor_sizes, width) | options
    try:
        model: nn.Module = DETECTORS[kind](whole, num_classes, **given)
    except (TypeError, ValueError) as error:
        raise OptionError(f"torchvision does not build this {kind}: {error}") from error
    return model if trainable_layers is None else freeze_stages(model, trainable_layers)


def freeze_stages(model: nn.Module, trainable_layers: int) -> nn.Module:
    """Freeze all but the last stages of a detector's backbone, in place, as torchvision's `trainable_backbone_layers`.

    trainable_layers: how many of layer4, layer3, layer2, layer1 and the stem stay trainable, 5 being all. In networks
    without these names, a stage is what ends at the same stride.
    model: a detector or segmentation network with a `backbone`, or the backbone itself. In the frozen stages no
    parameter requires a gradient, and norms with running statistics keep them, also after `train()`
    (`normswap.freeze`; `unfreeze` undoes that).

    Raises OptionError for another number, or where the stages are not the backbone's own children.
    """
    if isinstance(trainable_layers, bool) or trainable_layers not in range(_STAGES + 1):
        raise OptionError(f"trainable_layers must be 0 to {_STAGES}, got {trainable_layers!r}")
    backbone = getattr(model, "backbone", model)
    body = getattr(backbone, "body", backbone)
    stages = stages_of(body)
    if len(set(stages.values())) < 2:
        raise OptionError(
            f"the stages of {type(body).__name__} cannot be told apart: no two of its children give maps of "
            "different sizes",
            hint="Freeze its parameters by name, and its norms with normswap.freeze(model, modules=PATTERN).",
        )
    last = max(stages.values())
    for module, stage in stages.items():
        if stage <= last - trainable_layers:
            _freeze_whole(module)
    return model


def _freeze_whole(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    norms = [(path, m, identify(m)) for path, m in module.named_modules()]
    moving = [path for path, m, spec in norms if spec and spec.name != "frozen" and spec.read(m).has_statistics]
    if moving:
        freeze(module, affine=False, modules=None if moving == [""] else moving)


def _check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Torchvision passes what it does not know on to its transform, which drops it."""
    known = {name for cls in (DETECTORS[kind], GeneralizedRCNNTransform) for name in signature(cls).parameters}
    for name in options.keys() - known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else None
        raise OptionError(f"torchvision's {DETECTORS[kind].__name__} has no option {name!r}", hint=hint)


# --- building -----------------------------------------------------------------------------------------------------


def _with_pyramid(kind: str, backbone: nn.Module, norm_layer: NormLayer | None, width: int) -> PyramidBackbone:
    two_stages = kind in _TWO_STAGES
    body, levels = body_of(backbone, finest=4 if two_stages else 8)
    extra = LastLevelMaxPool() if two_stages else LastLevelP6P7(width, width)
    return PyramidBackbone(body, levels, norm_layer, extra, width)


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
        head = FCOSHead(channels, 1, num_classes)
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


def _norm_layer(norm: str | None, groups: int | str | None, width: int) -> NormLayer | None:
    """What makes a fresh norm for a number of channels; known to work for `width`, that of pyramid and heads."""
    if norm is None or norm == "none":
        if groups is not None:
            raise OptionError("groups apply to gn only")
        return None
    spec = get(norm)
    if norm in ("frozen", "fused"):
        raise OptionError(
            f"new layers have no statistics to freeze, so norm={norm!r} makes no sense for them",
            hint='Give the backbone alone frozen norms, and norm="gn" or None here.',
        )
    if groups is not None and norm != "gn":
        raise OptionError(f"groups apply to gn only, not to {norm}")
    request = Request(PAPER_GROUPS if norm == "gn" and groups is None else groups)

    def layer(channels: int) -> nn.Module:
        state = NormState(
            channels, 1e-5, nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)),
            torch.zeros(channels), torch.ones(channels), torch.zeros((), dtype=torch.long), dims=2,
        )  # fmt: skip
        try:
            return build(spec, state, spec.fit(state, request))
        except Misfit as misfit:
            raise OptionError(f"norm={norm!r} does not fit the detector's own layers: {misfit}") from misfit

    layer(width)
    return layer
