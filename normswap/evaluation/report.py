"""What `evaluate` reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..display.overview import ReportInNotebook
from ..errors import plural

FIGURES = {
    "accuracy": "accuracy",
    "accuracy_top5": "top-5 accuracy",
    "map": "mAP",
    "map_50": "mAP at IoU 0.5",
    "map_75": "mAP at IoU 0.75",
    "mask_map": "mAP of masks",
    "mask_map_50": "mAP of masks at IoU 0.5",
    "miou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
}
"""What each figure is called."""
OF_CLASSES = {"classification": "accuracy", "detection": "AP", "segmentation": "IoU"}
"""What each class has, by task."""
COUNTED = {"classification": "images", "detection": "boxes", "segmentation": "pixels"}
"""What `ClassFigure.count` counts, by task."""


@dataclass(frozen=True)
class ClassFigure:
    """One class. count: its images, boxes or pixels in the data. value: its accuracy, AP or IoU; None without any."""

    name: str
    count: int
    value: float | None


@dataclass(frozen=True)
class EvaluationReport(ReportInNotebook):
    """The result of `evaluate`.

    figures: of all `images`, by the names in `FIGURES`, shares from 0 to 1; `score` is the first. classes: those that
    the data has, in the network's order. confusion: (true, predicted, count) of images, or of pixels, wherever the
    count is not 0; the numbers are the network's classes, and `names` says what they are called; empty for detection.
    bad: images that could not be read and were left out.
    """

    task: str
    images: int
    figures: dict[str, float]
    classes: tuple[ClassFigure, ...] = field(repr=False)
    names: tuple[str, ...] = field(default=(), repr=False)
    confusion: tuple[tuple[int, int, int], ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()

    @property
    def score(self) -> tuple[str, float]:
        """The figure that counts, with its name: accuracy, mAP or mean IoU."""
        name, value = next(iter(self.figures.items()))
        return FIGURES[name], value

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

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self),
            "score": self.score[1],
            "classes": [asdict(each) for each in self.classes],
            "names": list(self.names),
            "confusion": [list(cell) for cell in self.confusion],
            "notes": list(self.notes),
            "bad": list(self.bad),
        }

    def __str__(self) -> str:
        lines = [f"{FIGURES[name]}: {value:.4f}" for name, value in self.figures.items()]
        lines[0] += f" on {plural(self.images, 'image')}"
        if self.worst and len(self.classes) > 1:
            worst = self.worst[0]
            lines.append(f"worst of {len(self.classes)} classes: {worst.name} ({worst.value:.4f})")
        return "\n".join([*lines, *self.notes])


def matrix(report: EvaluationReport) -> tuple[list[str], list[list[int]]]:
    """The confusion matrix over the classes that are there or predicted: names, and a row for each true class."""
    numbers = sorted({number for cell in report.confusion for number in cell[:2]})
    place = {number: i for i, number in enumerate(numbers)}
    rows = [[0] * len(numbers) for _ in numbers]
    for true, predicted, count in report.confusion:
        rows[place[true]][place[predicted]] = count
    return named(numbers, report.names), rows


def named(numbers: Sequence[int], names: Sequence[str]) -> list[str]:
    """What classes are called; a number where nobody says it."""
    return [names[number] if number < len(names) else str(number) for number in numbers]
