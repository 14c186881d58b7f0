"""The table that a run prints as it goes, one row an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...display.progress import duration

STAR = "*"
_LEAST = {"epoch": 5, "steps": 6, "lr": 8, "time": 7}  # columns; titles of figures are wide enough


@dataclass(frozen=True)
class Row:
    """An epoch, or what training began with.

    loss: mean over the steps since the row before, None where there was none. figures: of validation, those to be
    shown. lr: of the last step. seconds: since the row before. best: whether the network is the best so far.
    """

    epoch: float
    step: int
    loss: float | None
    figures: Mapping[str, float]
    lr: float | None
    seconds: float
    best: bool


class EpochTable:
    """Makes rows into lines of aligned columns. The first row, whose figures are those of all, brings the titles."""

    def __init__(self) -> None:
        self._begun = False

    def lines(self, row: Row) -> Iterator[str]:
        """The titles, if they are due, and the row; a star marks the best network so far."""
        cells = {
            "epoch": f"{row.epoch:.3g}",
            "steps": str(row.step),
            "train loss": _figure(row.loss),
            **{name.replace("_", " "): _figure(value) for name, value in row.figures.items()},
            "lr": "-" if row.lr is None else f"{row.lr:.2e}",
            "time": f"{row.seconds:.1f} s" if row.seconds < 60 else duration(row.seconds),
        }
        widths = {title: max(len(title), _LEAST.get(title, 8)) for title in cells}
        if not self._begun:
            self._begun = True
            yield "  ".join(f"{title:>{width}}" for title, width in widths.items())
        mark = f"  {STAR}" if row.best else ""
        yield "  ".join(f"{cells[title]:>{width}}" for title, width in widths.items()) + mark


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"
