"""Figures of each class, beside those of all: one meter a task, over the batches that the tasks of fine-tuning make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..finetuning.tasks.classification import check_labels
from ..finetuning.tasks.detection import MeanPrecision
from ..finetuning.tasks.segmentation import Overlap
from ..heads.classifier import scores_of
from .labels import Classes
from .report import ClassFigure, named

_BEST = 5
Cells = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Counted:
    """What a meter has found; see `EvaluationReport`."""

    figures: dict[str, float]
    classes: tuple[ClassFigure, ...]
    names: tuple[str, ...]
    confusion: Cells = ()
    note: str = ""


class ClassMeter(Protocol):
    """Gathers batch by batch."""

    def add(self, model: nn.Module, content: Any) -> None:
        """Run the network, in eval mode, on one batch as the task collates it, on the network's device."""

    def result(self) -> Counted:
        """Of all batches, of which there is one at least."""


class Classified:
    """Top-1 and top-5 accuracy, and what each class is taken for: NaN where a score is that, which is no answer."""

    def __init__(self, classes: Classes) -> None:
        self._classes = classes
        self._known = self._best = self._right = self._images = 0
        self._pairs: list[Tensor] = []

    def add(self, model: nn.Module, content: Any) -> None:
        """One batch: inputs `(N, *)` and labels `(N,)`."""
        inputs, labels = content
        scores = scores_of(model(inputs)).float()
        self._known = scores.shape[1]
        labels = self._classes.numbered(labels.cpu(), self._known)
        check_labels(labels, scores)
        labels = labels.to(scores.device)
        usable = ~scores.isnan().any(1)
        best = scores.topk(min(_BEST, self._known)).indices == labels[:, None]
        self._best += int((best.any(1) & usable).sum())
        self._right += int((best[:, 0] & usable).sum())
        self._images += len(labels)
        predicted = torch.where(usable, scores.argmax(1), self._known)
        self._pairs.append((labels * (self._known + 1) + predicted).cpu())

    def result(self) -> Counted:
        """`accuracy`, and `accuracy_top5` where there are more classes than that."""
        figures = {"accuracy": self._right / self._images}
        if self._known > _BEST:
            figures["accuracy_top5"] = self._best / self._images
        codes, counts = torch.cat(self._pairs).unique(return_counts=True)
        cells = tuple(
            (*divmod(code, self._known + 1), count) for code, count in zip(codes.tolist(), counts.tolist(), strict=True)
        )
        names = (*self._classes.names(self._known), "NaN")
        return Counted(figures, _accuracies(cells, names), names, cells, self._classes.note(self._known))


def _accuracies(cells: Cells, names: tuple[str, ...]) -> tuple[ClassFigure, ...]:
    total: dict[int, int] = {}
    right: dict[int, int] = {}
    for true, predicted, count in cells:
        total[true] = total.get(true, 0) + count
        right[true] = right.get(true, 0) + count * (true == predicted)
    return tuple(ClassFigure(names[true], total[true], right[true] / total[true]) for true in sorted(total))


class Overlapped:
    """Mean intersection over union, that of each class, and pixel accuracy."""

    def __init__(self, classes: Classes) -> None:
        self._classes, self._overlap = classes, Overlap()

    def add(self, model: nn.Module, content: Any) -> None:
        """One batch: lists of images and of masks."""
        self._overlap.add(model, content)

    def result(self) -> Counted:
        """`miou` and `pixel_accuracy`; a class that is neither there nor predicted has no IoU."""
        found = self._overlap.result(lambda value: value)
        counts = self._overlap.confusion.round().long()
        names = self._classes.names(len(counts))
        both, rows = counts.diag(), counts.sum(1)
        either = rows + counts.sum(0) - both
        classes = (
            ClassFigure(name, count, one / union if union else None)
            for name, count, one, union in zip(names, rows.tolist(), both.tolist(), either.tolist(), strict=True)
        )
        cells = tuple((i, j, int(counts[i, j])) for i, j in counts.nonzero().tolist())
        figures = {name: found[f"val_{name}"] for name in ("miou", "pixel_accuracy")}
        return Counted(figures, tuple(each for each in classes if each.value is not None), names, cells)


class Detected:
    """COCO's mean average precision, and that of each class, of boxes; of masks too where the network gives them.

    known: how many classes the network tells apart, with the background; None where that is not known.
    """

    def __init__(self, classes: Classes, known: int | None) -> None:
        self._classes, self._known = classes, known
        self._precision = MeanPrecision(per_class=True)
        self._boxes: dict[int, int] = {}

    def add(self, model: nn.Module, content: Any) -> None:
        """One batch: lists of images and of targets."""
        images, targets = content
        if self._known is not None:
            targets = [{**t, "labels": self._classes.numbered(t["labels"], self._known)} for t in targets]
        for target in targets:
            for label in _objects(target).tolist():
                self._boxes[label] = self._boxes.get(label, 0) + 1
        self._precision.add(model, (images, targets))

    def result(self) -> Counted:
        """`map`, `map_50`, `map_75`; with masks also `mask_map`, `mask_map_50`."""
        found = self._precision.compute()
        figures = {name.removeprefix("val_"): value for name, value in found.figures.items()}
        data = self._classes.data or ()
        names = self._classes.names(self._known) if self._known is not None else ("", *data)
        if not self._boxes:
            raise DataError("no image has an object, so there is no mAP")
        numbers = sorted(self._boxes)
        classes = (
            ClassFigure(name, self._boxes[number], found.by_class.get(number))
            for number, name in zip(numbers, named(numbers, names), strict=True)
        )
        note = "" if self._known is None else self._classes.note(self._known)
        return Counted(figures, tuple(classes), names, note=note)


def _objects(target: Mapping[str, Tensor]) -> Tensor:
    """The labels of what counts: regions with many objects do not."""
    labels = target["labels"]
    crowd = target.get("iscrowd")
    return labels if crowd is None else labels[crowd == 0]
