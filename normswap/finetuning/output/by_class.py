"""Figures of each class, and what each is taken for: what a validation and `normswap evaluate` both tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...display.overview import Cell, Table

OF_CLASSES = {"classification": "accuracy", "detection": "AP", "segmentation": "IoU"}
"""What each class has, by task."""
COUNTED = {"classification": "images", "detection": "boxes", "segmentation": "pixels"}
"""What `ClassFigure.count` counts, by task."""
Cells = tuple[tuple[int, int, int], ...]
"""Of a confusion matrix: (true, predicted, count) wherever the count is not 0."""


@dataclass(frozen=True)
class ClassFigure:
    """One class. count: its images, boxes or pixels in the data. value: its accuracy, AP or IoU; None without any."""

    name: str
    count: int
    value: float | None


@dataclass(frozen=True)
class ByClass:
    """The classes that the data has, in the network's order; `names` of all that the network tells apart.

    confusion: in images, or in pixels; the numbers are the network's classes; empty for detection.
    """

    classes: tuple[ClassFigure, ...] = ()
    names: tuple[str, ...] = ()
    confusion: Cells = ()


class ToldByClass:
    """What the fields of `ByClass` say, for reports that have them."""

    classes: tuple[ClassFigure, ...]
    names: tuple[str, ...]
    confusion: Cells

    @property
    def worst(self) -> tuple[ClassFigure, ...]:
        """The classes that the data has, the worst first."""
        known = [each for each in self.classes if each.value is not None]
        return tuple(sorted(known, key=lambda each: each.value or 0.0))

    def taken_for(self) -> dict[str, tuple[str, int]]:
        """For each class some of which is told wrongly: the other that it is most often taken for, and how often."""
        wrong: dict[int, Counter[int]] = {}
        for true, predicted, count in self.confusion:
            if true != predicted:
                wrong.setdefault(true, Counter())[predicted] += count
        most = {true: counts.most_common(1)[0] for true, counts in wrong.items()}
        return {self.names[true]: (self.names[other], count) for true, (other, count) in most.items()}

    def classes_to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "classes": [asdict(each) for each in self.classes],
            "names": list(self.names),
            "confusion": [list(cell) for cell in self.confusion],
        }

    def classes_table(self, task: str, most: int | None) -> Table:
        """The worst, `most` of them, or with None all in their order."""
        taken = self.taken_for()
        columns = ("class" if most is None else "worst classes", f">{COUNTED[task]}", f">{OF_CLASSES[task]}")
        rows: list[tuple[Cell, ...]] = []
        for each in self.classes if most is None else self.worst[:most]:
            value = "none" if each.value is None else f"{each.value:.4f}"
            rows.append(((each.name, "path"), str(each.count), value, *[_other(taken.get(each.name))] * bool(taken)))
        return Table((*columns, *["most often taken for"] * bool(taken)), tuple(rows))

    def told_worst(self) -> list[str]:
        """A sentence on the worst class, where there are several."""
        if not self.worst or len(self.classes) < 2:
            return []
        worst = self.worst[0]
        return [f"worst of {len(self.classes)} classes: {worst.name} ({worst.value:.4f})"]


def _other(taken: tuple[str, int] | None) -> str:
    return "" if taken is None else "{} ({})".format(*taken)


class Answers:
    """What the images of each class are taken for: NaN where a score is that, which is no answer."""

    def __init__(self) -> None:
        self.known = 0
        self._codes: list[Tensor] = []

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Scores `(N, K)` and int64 labels `(N,)` on one device."""
        self.known = scores.shape[1]
        predicted = torch.where(scores.isnan().any(1), self.known, scores.argmax(1))
        self._codes.append((labels * (self.known + 1) + predicted).cpu())

    def cells(self) -> Cells:
        """The number after the last class is that of NaN."""
        if not self._codes:
            return ()
        codes, counts = torch.cat(self._codes).unique(return_counts=True)
        pairs = zip(codes.tolist(), counts.tolist(), strict=True)
        return tuple((*divmod(code, self.known + 1), count) for code, count in pairs)


def summed(parts: Iterable[Cells]) -> Cells:
    """The cells of several processes as one matrix."""
    total: Counter[tuple[int, int]] = Counter()
    for cells in parts:
        for true, predicted, count in cells:
            total[true, predicted] += count
    return tuple((*pair, count) for pair, count in sorted(total.items()))


def accuracies(cells: Cells, names: Sequence[str]) -> ByClass:
    """The share of each class's images that are told rightly."""
    total: Counter[int] = Counter()
    right: Counter[int] = Counter()
    for true, predicted, count in cells:
        total[true] += count
        right[true] += count * (true == predicted)
    classes = (ClassFigure(names[true], total[true], right[true] / total[true]) for true in sorted(total))
    return ByClass(tuple(classes), tuple(names), cells)


def overlaps(confusion: Tensor, names: Sequence[str]) -> ByClass:
    """Intersection over union of pixels `(K, K)`, a row for each true class; none where a class is nowhere."""
    counts = confusion.round().long()
    both, rows = counts.diag(), counts.sum(1)
    either = rows + counts.sum(0) - both
    columns = (rows.tolist(), both.tolist(), either.tolist())
    classes = (
        ClassFigure(name, count, one / union) for name, count, one, union in zip(names, *columns, strict=True) if union
    )
    cells = tuple((i, j, int(counts[i, j])) for i, j in counts.nonzero().tolist())
    return ByClass(tuple(classes), tuple(names), cells)


def precisions(values: dict[int, float], boxes: dict[int, int], names: Sequence[str]) -> ByClass:
    """The average precision of each class that has boxes. names: of label 0, the background, 1, ..."""
    numbers = sorted(boxes)
    classes = (
        ClassFigure(name, boxes[number], values.get(number))
        for number, name in zip(numbers, named(numbers, names), strict=True)
    )
    return ByClass(tuple(classes), tuple(names))


def matrix(found: ByClass | ToldByClass) -> tuple[list[str], list[list[int]]]:
    """The confusion matrix over the classes that are there or predicted: names, and a row for each true class."""
    numbers = sorted({number for cell in found.confusion for number in cell[:2]})
    place = {number: i for i, number in enumerate(numbers)}
    rows = [[0] * len(numbers) for _ in numbers]
    for true, predicted, count in found.confusion:
        rows[place[true]][place[predicted]] = count
    return named(numbers, found.names), rows


def named(numbers: Iterable[int], names: Sequence[str]) -> list[str]:
    """What classes are called; a number where nobody says it."""
    return [names[number] if number < len(names) else str(number) for number in numbers]
