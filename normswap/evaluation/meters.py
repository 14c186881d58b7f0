"""Figures of each class, beside those of all: one meter a task, over the batches that the tasks of fine-tuning make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ..finetuning.datasets.batched import called
from ..finetuning.output.by_class import Answers, ByClass, accuracies, overlaps, precisions
from ..finetuning.tasks.classification import check_labels
from ..finetuning.tasks.detection import MeanPrecision
from ..finetuning.tasks.segmentation import Overlap
from ..heads.classifier import scores_of
from .labels import Classes

_BEST = 5


@dataclass(frozen=True)
class Counted:
    """What a meter has found; see `EvaluationReport`."""

    figures: dict[str, float]
    of: ByClass
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
        self._answers = Answers()
        self._best = self._right = self._images = 0

    def add(self, model: nn.Module, content: Any) -> None:
        """One batch: inputs `(N, *)`, or a tuple of forward's arguments, and labels `(N,)`."""
        inputs, labels = content
        scores = scores_of(called(model, inputs)).float()
        labels = self._classes.numbered(labels.cpu(), scores.shape[1])
        check_labels(labels, scores)
        labels = labels.to(scores.device)
        usable = ~scores.isnan().any(1)
        best = scores.topk(min(_BEST, scores.shape[1])).indices == labels[:, None]
        self._best += int((best.any(1) & usable).sum())
        self._right += int((best[:, 0] & usable).sum())
        self._images += len(labels)
        self._answers.add(scores, labels)

    def result(self) -> Counted:
        """`accuracy`, and `accuracy_top5` where there are more classes than that."""
        figures, known = {"accuracy": self._right / self._images}, self._answers.known
        if known > _BEST:
            figures["accuracy_top5"] = self._best / self._images
        names = (*self._classes.names(known), "NaN")
        return Counted(figures, accuracies(self._answers.cells(), names), self._classes.note(known))


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
        confusion = self._overlap.confusion
        figures = {name: found[f"val_{name}"] for name in ("miou", "pixel_accuracy")}
        return Counted(figures, overlaps(confusion, self._classes.names(len(confusion))))


class Detected:
    """COCO's mean average precision, and that of each class, of boxes; of masks too where the network gives them.

    known: how many classes the network tells apart, with the background; None where that is not known.
    """

    def __init__(self, classes: Classes, known: int | None) -> None:
        self._classes, self._known = classes, known
        self._precision = MeanPrecision()

    def add(self, model: nn.Module, content: Any) -> None:
        """One batch: lists of images and of targets."""
        images, targets = content
        if self._known is not None:
            targets = [{**t, "labels": self._classes.numbered(t["labels"], self._known)} for t in targets]
        self._precision.add(model, (images, targets))

    def result(self) -> Counted:
        """`map`, `map_50`, `map_75`; with masks also `mask_map`, `mask_map_50`."""
        found = self._precision.compute(per_class=True)
        figures = {name.removeprefix("val_"): value for name, value in found.figures.items()}
        names = self._classes.names(self._known) if self._known is not None else ("", *(self._classes.data or ()))
        note = "" if self._known is None else self._classes.note(self._known)
        return Counted(figures, precisions(found.by_class, found.boxes, names), note)
