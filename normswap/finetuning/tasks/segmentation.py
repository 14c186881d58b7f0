"""Semantic segmentation: one class for each pixel, cross-entropy, mean intersection over union."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.segmentation_masks import IGNORED
from ...errors import DataError, Fix, Text
from ...heads.classifier import Head, scores_of
from ..datasets.loader import spread
from ..datasets.masks import open_mask_sets, open_one, plain, prepared_masks
from ..datasets.splits import Sets
from ..output.by_class import ByClass, named, overlaps
from ..output.panel import Panel
from ..output.plots import masks_page
from .base import Outcome, Reduce, parameters_of_head
from .head import fitted_predictor
from .metrics import metric, over_all

AUXILIARY = 0.5
"""The weight of an auxiliary classifier's loss, as in torchvision's reference."""


@dataclass
class Segmentation:
    """Cross-entropy of the pixels whose class is known (not 255), and half of that of an auxiliary classifier.

    The network gives scores `(N, K, h, w)`, as a tensor, as `out` (and `aux`) of a dict, or as `logits`; they are
    resized to the masks (bilinear). Images of different sizes are padded to form a batch in training.
    """

    label_smoothing: float = 0.0
    classes: int | None = None
    names: tuple[str, ...] = ()

    name: ClassVar[str] = "segmentation"
    best: ClassVar[str] = "val_miou"
    at_once: ClassVar[int] = 1
    compiled_part: ClassVar[str | None] = None
    panels: ClassVar[tuple[Panel, ...]] = (
        Panel("loss", ("loss", "val_loss")),
        Panel("pixel accuracy", ("pixel_accuracy", "val_pixel_accuracy")),
        Panel("validation mean IoU", ("val_miou",)),
        Panel("learning rate", ("lr",)),
    )

    def open(self, model: nn.Module, data: Any, eval_data: Any, *, seed: int) -> Sets:
        """See `open_mask_sets`."""
        return open_mask_sets(data, eval_data, seed=seed)

    def open_one(self, model: nn.Module, data: Any) -> Sets:
        """See `masks.open_one`."""
        return open_one(data)

    def prepared(self, sets: Sets, preprocess: Callable[[Any], Tensor] | None, augment: str) -> Sets:
        """Normalised, and in training scaled, cropped and mirrored with their masks, as `augment` says."""
        return prepared_masks(sets, preprocess, augment)

    def inputs(self, sets: Sets, preprocess: Callable[[Any], Tensor] | None, count: int) -> Iterator[Tensor]:
        """Single images `(1, 3, H, W)`, which may differ in size."""
        for image, _ in spread(plain(sets.train, preprocess), count):
            yield image[None]

    def fit(self, model: nn.Module, sets: Sets, num_classes: int | None, seed: int) -> Head | None:
        """The last convolutions of torchvision's networks; None for others."""
        self.names = sets.classes or ()
        head = fitted_predictor(model, sets.count, num_classes, seed, whole_network=True)
        self.classes = None if head is None else head.classes
        return head

    def head_parameters(self, model: nn.Module, head: Head | None) -> Collection[str] | None:
        """All that is in the role `head`."""
        return parameters_of_head(model)

    def collate(self, items: Sequence[Any]) -> Any:
        """A list of images and a list of masks. Raises DataError for what is none, or has unknown classes."""
        for item in items:
            if not isinstance(item, (tuple, list)) or len(item) != 2 or not all(isinstance(t, Tensor) for t in item):
                raise DataError("a sample of segmentation is (image, mask), tensors (C, H, W) and int64 (H, W)")
            self._check(*item)
        return [item[0] for item in items], [item[1] for item in items]

    def _check(self, image: Tensor, mask: Tensor) -> None:
        if image.dim() != 3 or not image.is_floating_point() or mask.dim() != 2:
            raise DataError(f"an image is {image.dtype} {tuple(image.shape)} and its mask {tuple(mask.shape)}")
        if mask.dtype != torch.int64:
            raise DataError(f"a mask is {mask.dtype}; its pixels are class numbers, int64")
        check_classes(mask, self.classes)

    def outcome(self, forward: Callable[..., Any], content: Any) -> Outcome:
        """The mean loss of the pixels of one batch."""
        for image, mask in zip(*content, strict=True):
            if mask.shape != image.shape[1:]:
                raise DataError(f"a training image is {tuple(image.shape)} and its mask {tuple(mask.shape)}")
        images, masks = _padded(content[0], 0), _padded(content[1], IGNORED)
        output = forward(images)
        scores = _at(scores_of(output, per_pixel=True), masks)
        if self.classes is None:  # from now on `collate` knows
            check_classes(masks, scores.shape[1])
            self.classes = scores.shape[1]
        loss = self._loss(scores, masks)
        aux = output.get("aux") if isinstance(output, Mapping) else None
        if isinstance(aux, Tensor):
            loss = loss + AUXILIARY * self._loss(_at(aux, masks), masks)
        known = (masks != IGNORED).sum().clamp_min(1)
        right = (scores.detach().argmax(1) == masks).sum() / known
        return Outcome(loss, {"pixel_accuracy": right * len(images)})

    def _loss(self, scores: Tensor, masks: Tensor) -> Tensor:
        """Zero, not NaN, where no pixel is known."""
        total = F.cross_entropy(
            scores, masks, ignore_index=IGNORED, reduction="sum", label_smoothing=self.label_smoothing
        )  # fmt: skip
        return total / (masks != IGNORED).sum().clamp_min(1)

    def meter(self) -> Overlap:
        """Loss, mean IoU and pixel accuracy over a validation set."""
        return Overlap()

    def draw(self, network: nn.Module, content: Any, path: Path) -> bool:
        """True classes beside those predicted."""
        images, masks = content
        scores = (scores_of(network(image[None]), per_pixel=True) for image in images)
        found = [_at(one, mask[None])[0].argmax(0) for one, mask in zip(scores, masks, strict=True)]
        return masks_page(path, images, [m.cpu() for m in masks], [f.cpu() for f in found], self.names)


class Overlap:
    """Mean cross-entropy, mean IoU and pixel accuracy of the known pixels, exact over any number of processes."""

    def __init__(self) -> None:
        self._overlap: Any = None
        self._loss = 0.0

    def add(self, model: nn.Module, content: Any) -> None:
        """One batch; images of one size run together, none is padded."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for i, (image, mask) in enumerate(zip(*content, strict=True)):
            groups[image.shape, mask.shape].append(i)
        for group in groups.values():
            images, masks = (torch.stack([part[i] for i in group]) for part in content)
            scores = _at(scores_of(model(images), per_pixel=True), masks)
            check_classes(masks, scores.shape[1])
            self._loss += float(F.cross_entropy(scores, masks, ignore_index=IGNORED, reduction="sum"))
            self._overlap = self._overlap or _overlap_of(scores.shape[1]).to(scores.device)
            self._overlap.update(scores, masks)

    @property
    def confusion(self) -> Tensor:
        """Known pixels `(K, K)`, a row for each true class; of one process, or of all after `result`."""
        if self._overlap is None:
            raise DataError("no image could be read")
        counts: Tensor = self._overlap.confmat
        return counts.cpu()

    def result(self, total: Reduce) -> dict[str, float]:
        """`val_loss`, `val_miou` (of the classes that are there or predicted) and `val_pixel_accuracy`."""
        own = self._overlap
        # A process without images does not know the number of classes.
        parts, classes = total(torch.tensor([1.0, own.num_classes] if own else [0.0, 0.0])).tolist()
        if not parts:
            raise DataError("no validation image could be read")
        own = own or _overlap_of(round(classes / parts))
        overlap, loss = over_all(own, total), float(total(torch.tensor(self._loss, dtype=torch.float64)))
        pixels = float(own.confmat.sum())
        if not pixels:
            raise DataError("all pixels of the validation masks are ignored (255)")
        right = float(own.confmat.diag().sum())
        self._overlap = own
        return {"val_loss": loss / pixels, "val_miou": overlap, "val_pixel_accuracy": right / pixels}

    def by_class(self, names: Sequence[str]) -> ByClass:
        """The IoU of each, and what its pixels are taken for."""
        return overlaps(self.confusion, named(range(len(self.confusion)), names))


def _overlap_of(classes: int) -> Any:
    return metric("MulticlassJaccardIndex", classes, ignore_index=IGNORED)


def check_classes(masks: Tensor, classes: int | None) -> None:
    """Raise DataError for pixels of a class that the network does not know. classes: None where that is not known."""
    known = masks[masks != IGNORED]
    if len(known) and (int(known.min()) < 0 or (classes is not None and int(known.max()) >= classes)):
        raise DataError(
            f"a mask has classes from {int(known.min())} to {int(known.max())}; the network knows 0 to "
            f"{(classes or 0) - 1}, and {IGNORED} is ignored",
            hint=Text(Fix("num_classes", int(known.max()) + 1), " gives it a new head."),
        )


def _at(scores: Tensor, masks: Tensor) -> Tensor:
    """float32 scores at the size of the masks."""
    scores = scores.float()
    if scores.shape[2:] == masks.shape[1:]:
        return scores
    return F.interpolate(scores, masks.shape[1:], mode="bilinear", align_corners=False)


def _padded(tensors: Sequence[Tensor], value: float) -> Tensor:
    """One tensor of maps `(*, H, W)`, padded at the right and at the bottom."""
    height, width = (max(t.shape[d] for t in tensors) for d in (-2, -1))
    return torch.stack([F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2]), value=value) for t in tensors])
