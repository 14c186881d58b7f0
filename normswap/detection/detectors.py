"""Detectors: convert them part by part, build one on a converted backbone, freeze the first stages of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from torch import nn
from torchvision.models import detection as zoo
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..arguments import whole as check_whole
from ..conversion.composite import adopt_part_records
from ..conversion.convert import convert as convert_whole
from ..errors import OptionError, did_you_mean
from ..freezing import freeze
from ..modules.wrappers import check_module
from ..norms.registry import identify
from ..planning.rules import Rules
from .backbones import stages_of
from .parts import norm_layer_of, parts_of

DETECTORS = {
    "fasterrcnn": zoo.FasterRCNN,
    "maskrcnn": zoo.MaskRCNN,
    "keypointrcnn": zoo.KeypointRCNN,
    "retinanet": zoo.RetinaNet,
    "fcos": zoo.FCOS,
    "ssd": SSD,
}
WIDTH = 256
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

    kind: `fasterrcnn`, `maskrcnn`, `keypointrcnn`, `retinanet`, `fcos` or `ssd`. num_classes: with the background, as
    in torchvision. backbone: a classifier, converted or not, with `layer1` ... `layer4` or `features`; a timm network
    made with features_only=True; or a module that gives feature maps as a dict, list or tuple. The pyramid goes on its
    maps of stride 4 (one-stage detectors: 8) to 32. A module that gives a dict and has an int `out_channels` is taken
    as it is. Its modules become part of the detector; they are not copied. What a conversion of it has on record
    becomes that of the detector, so that this can be trained, saved and reverted like a converted network.

    norm: in the pyramid, in the box head (four convolutions and a fully connected layer instead of two of the latter),
    the mask and keypoint heads, and the heads of one-stage detectors, as in Wu and He 2018, "Group Normalization",
    section 4.2; not in the region proposals. `ssd` has blocks of ever smaller maps in place of a pyramid, with the norm
    in them, and single convolutions as heads (Liu et al. 2016, "SSD", section 2.1). None: no norm there. groups: for
    `gn`, 32 by default, as in Wu and He.
    trainable_layers: see `freeze_stages`. anchor_sizes: the side of the anchors of each level in pixels, by default
    8 times the stride (`retinanet`: 4 times, each with two steps to the next; `ssd`: 0.15 to 0.9 of the image). width:
    channels of the pyramid, if it is made here, and of the box head. options: those of the torchvision class, such as
    min_size, max_size, box_detections_per_img, num_keypoints; for `ssd`, size (default 300).

    Raises OptionError for a kind, norm, number or backbone that does not fit.
    """
    if kind not in DETECTORS:
        raise OptionError(
            f"unknown kind of detector {kind!r}; known: {', '.join(DETECTORS)}",
            hint=did_you_mean(kind, DETECTORS) if isinstance(kind, str) else None,
        )
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise OptionError(f"num_classes counts the background, so it is at least 2, not {num_classes!r}")
    check_module(backbone)
    _check_options(kind, options)
    check_whole("width", width)
    norm_layer = norm_layer_of(norm, groups, width)
    image = _image_size(options)
    given = parts_of(kind, backbone, num_classes, norm_layer, anchor_sizes, width, image) | options
    try:
        model: nn.Module = DETECTORS[kind](num_classes=num_classes, **given)
    except (TypeError, ValueError) as error:
        raise OptionError(f"torchvision does not build this {kind}: {error}") from error
    adopt_part_records(model)
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
    moving = [path for path, m, spec in norms if spec and not spec.fixed and spec.read(m).has_statistics]
    if moving:
        freeze(module, affine=False, modules=None if moving == [""] else moving)


def _image_size(options: dict[str, Any]) -> tuple[int, int]:
    """SSD's `size`, one number or (height, width), taken out of the options."""
    size = options.pop("size", 300)
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2:
        raise OptionError(f"size must be one number or (height, width), got {size!r}")
    for side in pair:
        check_whole("size", side, least=32)
    return pair[0], pair[1]


def _check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Torchvision passes what it does not know on to its transform, which drops it."""
    known = {name for cls in (DETECTORS[kind], GeneralizedRCNNTransform) for name in signature(cls).parameters}
    if kind == "ssd":
        known -= {"min_size", "max_size", "fixed_size", "size_divisible"}
    for name in options.keys() - known:
        hint = "Did you mean size?" if kind == "ssd" and "size" in name else did_you_mean(name, known)
        raise OptionError(f"torchvision's {DETECTORS[kind].__name__} has no option {name!r}", hint=hint)
