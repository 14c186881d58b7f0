"""What `evaluate` reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..display.overview import ReportInNotebook, Table
from ..errors import plural
from ..finetuning.output.by_class import ClassFigure, ToldByClass

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
_WORST = 10  # classes in a notebook


@dataclass(frozen=True)
class EvaluationReport(ToldByClass, ReportInNotebook):
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

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self),
            "score": self.score[1],
            **self.classes_to_dict(),
            "notes": list(self.notes),
            "bad": list(self.bad),
        }

    def _tables(self) -> list[Table]:
        return [self.classes_table(self.task, _WORST)] * (len(self.classes) > 1)

    def __str__(self) -> str:
        lines = [f"{FIGURES[name]}: {value:.4f}" for name, value in self.figures.items()]
        lines[0] += f" on {plural(self.images, 'image')}"
        lines += self.told_worst()
        return "\n".join([*lines, *self.notes])
