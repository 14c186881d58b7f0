"""Detection: boxes, and masks where the network has them, in the convention of torchvision's detectors; mAP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...arguments import one_of
from ...choices import AUGMENTS
from ...errors import DataError, NetworkError, NormswapError, OptionError, first_line
from ...heads.classifier import Head
from ...training.distributed import gathered
from ..datasets.boxes import DetectionImages, check_sample, open_boxes, open_one
from ..datasets.loader import spread
from ..datasets.splits import Sets
from ..output.by_class import ByClass, precisions
from ..output.panel import Panel
from ..output.plots import boxes_page
from .base import Outcome, Reduce, parameters_of_head
from .head import fitted_predictor

_CALIBRATED_AT_ONCE = 2
_PREDICTED = ("boxes", "labels", "scores", "masks")


@dataclass
class Detection:
    """The sum of the losses that the network gives in train mode; each is a figure of its own, `loss_...`.

    The network follows torchvision's convention: `model(images, targets)` in train mode, and `model(images)` in eval
    mode, which gives boxes, labels and scores, and perhaps masks, for each image. Images may differ in size.
    """

    classes: int | None = None
    names: tuple[str, ...] = ()
    masks: bool = False

    name: ClassVar[str] = "detection"
    best: ClassVar[str] = "val_map"
    at_once: ClassVar[int] = 1
    compiled_part: ClassVar[str | None] = "backbone"
    panels: ClassVar[tuple[Panel, ...]] = (
        Panel("training loss", ("loss",)),
        Panel("its parts", ("loss_*",)),
        Panel("validation mAP", ("val_map", "val_mask_map")),
        Panel("validation mAP at IoU 0.5", ("val_map_50", "val_mask_map_50")),
    )

    def open(self, model: nn.Module, data: Any, eval_data: Any, *, seed: int) -> Sets:
        """See `open_boxes`; with masks for networks that predict them."""
        self.masks = predicts_masks(model)
        if getattr(getattr(model, "roi_heads", None), "keypoint_head", None) is not None and _is_ours(data):
            raise DataError(
                "the network predicts keypoints, which normswap does not read from files",
                hint="Give a Dataset whose targets have keypoints, in torchvision's convention.",
            )
        return open_boxes(data, eval_data, masks=self.masks, seed=seed)

    def open_one(self, model: nn.Module, data: Any) -> Sets:
        """See `boxes.open_one`."""
        self.masks = predicts_masks(model)
        return open_one(data, masks=self.masks)

    def prepared(self, sets: Sets, preprocess: Callable[[Any], Tensor] | None, augment: str) -> Sets:
        """With half of the training images mirrored, unless `augment` is "none"; the network itself does the rest."""
        one_of("augment", augment, AUGMENTS)
        if augment == "none" or not isinstance(sets.train, DetectionImages):
            return sets
        return replace(sets, train=replace(sets.train, flip=True))

    def inputs(self, sets: Sets, preprocess: Callable[[Any], Tensor] | None, count: int) -> Iterator[list[Tensor]]:
        """Lists of images `(3, H, W)`."""
        images = [item[0] for item in spread(sets.train, count)]
        for start in range(0, len(images), _CALIBRATED_AT_ONCE):
            yield images[start : start + _CALIBRATED_AT_ONCE]

    def fit(self, model: nn.Module, sets: Sets, num_classes: int | None, seed: int) -> Head | None:
        """The class scores of torchvision's detectors; None for other networks that follow their convention."""
        self.names = sets.classes or ()
        in_data = None if sets.classes is None else len(sets.classes) + 1
        head = fitted_predictor(model, in_data, num_classes, seed, whole_network=False)
        self.classes = None if head is None else head.classes
        return head

    def head_parameters(self, model: nn.Module, head: Head | None) -> Collection[str] | None:
        """All that is in the role `head`: region proposals, box and mask heads, dense heads."""
        return parameters_of_head(model)

    def collate(self, items: Sequence[Any]) -> Any:
        """A list of images and a list of targets. Raises DataError for those that a detector would fail on."""
        for item in items:
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise DataError(f"a sample is {type(item).__name__}; detection takes (image, target)")
            check_sample(item[0], item[1], 2**62 if self.classes is None else self.classes)
            if self.masks and "masks" not in item[1]:
                raise DataError("the network predicts masks, and a target has none")
        return [item[0] for item in items], [dict(item[1]) for item in items]

    def outcome(self, forward: Callable[..., Any], content: Any) -> Outcome:
        """The sum of the losses on one batch."""
        images, targets = content
        losses = _called(forward, images, targets)
        if not isinstance(losses, Mapping) or not losses or not all(isinstance(v, Tensor) for v in losses.values()):
            raise NetworkError(
                f"in training the network gives {type(losses).__name__}; a detector in torchvision's convention gives "
                "a dict of losses",
                hint="Wrap it in a module whose forward(images, targets) does.",
            )
        total = torch.stack([v.float() for v in losses.values()]).sum()
        return Outcome(total, {_figure(k): v.detach().float() * len(images) for k, v in losses.items()})

    def meter(self) -> MeanPrecision:
        """mAP over a validation set."""
        return MeanPrecision()

    def draw(self, network: nn.Module, content: Any, path: Path) -> bool:
        """True boxes beside those with a score above 0.5."""
        images, targets = content
        return boxes_page(path, images, _on_cpu(targets), _on_cpu(network(list(images))), self.names)


@dataclass(frozen=True)
class Precision:
    """What a `MeanPrecision` comes to. by_class: the AP of the boxes of each label, where that was asked for.

    boxes: how many of each label the images have.
    """

    figures: dict[str, float]
    by_class: dict[int, float]
    boxes: dict[int, int]


class MeanPrecision:
    """COCO's mean average precision (torchmetrics), of boxes and, where the network gives them, of masks."""

    def __init__(self) -> None:
        self._metric: Any = None
        self._masks = False
        self._boxes: Counter[int] = Counter()

    def add(self, model: nn.Module, content: Any) -> None:
        """One batch."""
        images, targets = content
        found = _called(model, list(images))
        if not isinstance(found, list) or not all(isinstance(each, Mapping) and "boxes" in each for each in found):
            raise _no_detector(f"it gives {type(found).__name__}")
        found, targets = _on_cpu(found), _on_cpu(targets)
        if self._metric is None:
            self._masks = all("masks" in each for each in (*found, *targets))
            self._metric = _metric(self._masks)
        for target in targets:
            self._boxes.update(_objects(target).tolist())
        keys = _PREDICTED if self._masks else _PREDICTED[:3]
        predictions = [{k: v for k, v in each.items() if k in keys} for each in found]
        for each in predictions if self._masks else ():
            each["masks"] = each["masks"].reshape(-1, *each["masks"].shape[-2:]) > 0.5
        truths = [{k: v for k, v in each.items() if k in (*keys, "iscrowd")} for each in targets]
        for each in truths if self._masks else ():
            each["masks"] = each["masks"].bool()
        self._metric.update(predictions, truths)

    def result(self, total: Reduce) -> dict[str, float]:
        """`val_map` (IoU 0.5 to 0.95), `val_map_50`, `val_map_75`; with masks also `val_mask_map`, `..._50`."""
        return self.compute().figures

    def by_class(self, names: Sequence[str]) -> ByClass:
        """The AP of the boxes of each."""
        found = self.compute(per_class=True)
        return precisions(found.by_class, found.boxes, ("", *names))

    def compute(self, *, per_class: bool = False) -> Precision:
        """Over all processes, each of which calls this. per_class: of each class too, which takes a while.

        Each process has looked at its own images, so their parts are simply put together.
        """
        parts = gathered((self._masks, None if self._metric is None else self._metric.metric_state, self._boxes))
        parts = [part for part in parts if part[1] is not None]
        if not parts:
            raise DataError("no validation image could be read")
        masks = parts[0][0]
        whole = _metric(masks, per_class)
        whole.update([], [])
        for name in parts[0][1]:
            setattr(whole, name, [value for _, state, _ in parts for value in state[name]])
        figures = whole.compute()
        boxes, shapes = ("bbox_", "segm_") if masks else ("", "")
        found = {f"val_{k}": float(figures[boxes + k]) for k in ("map", "map_50", "map_75")}
        if masks:
            found |= {f"val_mask_{k}": float(figures[shapes + k]) for k in ("map", "map_50")}
        if found["val_map"] < 0:
            raise DataError("no validation image has an object, so there is no mAP", hint="Validate on others.")
        columns = (figures[name].reshape(-1).tolist() for name in ("classes", f"{boxes}map_per_class"))
        counts = sum((count for _, _, count in parts), Counter[int]())
        return Precision(found, dict(zip(*columns, strict=True)) if per_class else {}, counts)


def _objects(target: Mapping[str, Tensor]) -> Tensor:
    """The labels of what counts: regions with many objects do not."""
    labels = target["labels"]
    crowd = target.get("iscrowd")
    return labels if crowd is None else labels[crowd == 0]


def _called(network: Callable[..., Any], *args: Any) -> Any:
    """Raises OptionError for a network that does not take lists of images, as a classifier does not."""
    try:
        return network(*args)
    except (TypeError, AttributeError) as error:
        raise _no_detector(f"{type(error).__name__}: {first_line(error)}") from error


def _no_detector(why: str) -> OptionError:
    return OptionError(
        f"the network does not work as torchvision's detectors do ({why})",
        hint="A detector takes lists of images, and gives a dict of losses in train mode and a list of dicts with "
        "boxes, labels and scores in eval mode. normswap.detection.detector builds one on any backbone.",
    )


def predicts_masks(model: nn.Module) -> bool:
    """Whether it is a Mask R-CNN of torchvision."""
    return getattr(getattr(model, "roi_heads", None), "mask_head", None) is not None


def _metric(masks: bool, per_class: bool = False) -> Any:
    try:
        from torchmetrics.detection import MeanAveragePrecision

        kinds: Any = ("bbox", "segm") if masks else "bbox"
        metric = MeanAveragePrecision(iou_type=kinds, class_metrics=per_class, sync_on_compute=False)
    except ImportError as error:
        raise NormswapError("mAP needs torchmetrics and pycocotools", hint="pip install 'normswap[train]'") from error
    metric.warn_on_many_detections = False  # COCO counts the best 100; torchvision's SSD gives up to 200
    return metric


def _figure(name: str) -> str:
    """One-stage detectors leave `loss_` out."""
    return name if name.startswith("loss_") else f"loss_{name}"


def _on_cpu(dicts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: (v.float() if v.is_floating_point() else v).cpu() if isinstance(v, Tensor) else v for k, v in each.items()}
        for each in dicts
    ]


def _is_ours(data: Any) -> bool:
    from ...data.box_data import BoxData
    from ...data.synthetic_shapes import Shapes

    return isinstance(data, (str, Path, BoxData, Shapes))
