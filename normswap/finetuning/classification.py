"""Classification: images and one label each, cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DataError
from ..heads import scores_of
from ..training.losses import divergence
from .labelled import collate
from .task import Outcome, Reduce

AUXILIARY = 0.3
"""The weight of auxiliary classifiers' losses (Szegedy et al. 2014, section 5)."""
TEMPERATURE = 2.0


@dataclass
class Classification:
    """Cross-entropy on labels, and, with a teacher, `distill` of the loss on the teacher's scores instead.

    teacher: the original network, in eval mode, never changed; its share of the loss is
    `T^2 KL(softmax(teacher / T) || softmax(model / T))` at T = 2 (Hinton, Vinyals and Dean 2015).
    """

    label_smoothing: float = 0.0
    teacher: nn.Module | None = None
    distill: float = 0.0

    name: ClassVar[str] = "classification"
    best: ClassVar[str] = "val_accuracy"
    shares: ClassVar[Mapping[str, str]] = {"correct": "accuracy"}

    def collate(self, items: Sequence[Any]) -> Any:
        """`(N, *)` and int64 `(N,)`."""
        return collate(items)

    def outcome(self, forward: Callable[..., Any], content: Any) -> Outcome:
        """The loss on one batch, and how many are right. Raises DataError for labels without a score."""
        inputs, labels = content
        output = forward(inputs)
        scores = scores_of(output).float()
        _check(labels, scores)
        loss = F.cross_entropy(scores, labels, label_smoothing=self.label_smoothing)
        for more in _auxiliary(output):
            loss = loss + AUXILIARY * F.cross_entropy(more.float(), labels, label_smoothing=self.label_smoothing)
        if self.teacher is not None and self.distill:
            with torch.no_grad():
                wanted = scores_of(self.teacher(inputs))
            loss = (1 - self.distill) * loss + self.distill * divergence(wanted.to(scores), scores, TEMPERATURE)
        return Outcome(loss, {"correct": (scores.detach().argmax(1) == labels).sum()})

    def meter(self) -> Accuracy:
        """Loss and accuracy over a validation set."""
        return Accuracy()


class Accuracy:
    """Mean cross-entropy and share of right answers, exact over any number of processes and uneven parts."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, model: nn.Module, content: Any) -> None:
        """One batch."""
        inputs, labels = content
        scores = scores_of(model(inputs)).float()
        _check(labels, scores)
        loss = F.cross_entropy(scores, labels, reduction="sum")
        right = (scores.argmax(1) == labels).sum()
        sums = torch.stack([loss.double().cpu(), right.double().cpu(), torch.tensor(float(len(labels))).double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def result(self, total: Reduce) -> dict[str, float]:
        """`val_loss` and `val_accuracy`."""
        sums = total(self._sums if self._sums is not None else torch.zeros(3, dtype=torch.float64))
        loss, right, count = sums.tolist()
        if not count:
            raise DataError("no validation image could be read")
        return {"val_loss": loss / count, "val_accuracy": right / count}


def _auxiliary(output: Any) -> list[Tensor]:
    """Scores of auxiliary classifiers in the tuples of torchvision's GoogLeNet and Inception."""
    names = [n for n in getattr(output, "_fields", ()) if n.startswith("aux")]
    return [t for n in names if isinstance(t := getattr(output, n), Tensor)]


def _check(labels: Tensor, scores: Tensor) -> None:
    if labels.device.type != "cpu":
        return  # asking would make the device wait; `check_labels` has looked at what could be known before
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= scores.shape[1]:
        raise DataError(
            f"the labels go from {low} to {high}, but the network gives {scores.shape[1]} scores",
            hint=f"--num-classes {high + 1} (num_classes={high + 1}) gives it a new head.",
        )
