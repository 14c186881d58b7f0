"""What a run writes down as it goes: metrics.jsonl, curves.png, TensorBoard's files, figures for other trackers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...errors import OutputError
from ...files.writing import atomic
from .layout import BOARD, CURVES, METRICS
from .panel import Panel
from .plots import canvas_of, save_canvas
from .trackers import Trackers


class MetricsLog:
    """Figures of a run, one JSON object a line: `{"step": 40, "epoch": 0.4, "loss": 0.7, ...}`.

    Lines with `val_...` come from a validation. A resumed run first drops what lies beyond its step, so that the file
    ends up as that of a run without interruption. With no folder, nothing is written. trackers: get the same figures.
    """

    def __init__(
        self, folder: Path | None, *, step: int = 0, tensorboard: bool = False, trackers: Trackers | None = None
    ) -> None:
        self.lines: list[dict[str, Any]] = []
        self._trackers = trackers
        self._path = None if folder is None else folder / METRICS
        self._board: Any = None
        if self._path is not None:
            if step and self._path.exists():
                self.lines = [line for line in read_lines(self._path) if line["step"] <= step]
            with atomic(self._path) as temporary:
                temporary.write_text("".join(_text(line) for line in self.lines))
        if tensorboard and folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / BOARD), purge_step=step + 1 if step else None)

    def write(self, line: dict[str, Any]) -> None:
        """Add figures, rounded to what they mean."""
        line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
        self.lines.append(line)
        if self._path is not None:
            try:
                with self._path.open("a") as file:
                    file.write(_text(line))
            except OSError as error:
                raise OutputError(f"{self._path} cannot be written: {error.strerror or error}") from error
        named = {name.replace("val_", "validation/"): value for name, value in line.items() if name != "step"}
        if self._board is not None:
            for name, value in named.items():
                if name != "epoch":
                    self._board.add_scalar(name, value, line["step"])
        if self._trackers is not None:
            self._trackers.log(named, line["step"])

    def close(self) -> None:
        """Let TensorBoard's file be complete, and end the trackers' runs."""
        if self._board is not None:
            self._board.close()
        if self._trackers is not None:
            self._trackers.close()

    def draw(self, panels: Sequence[Panel], title: str, best: tuple[str, int] | None = None) -> bool:
        """Write curves.png, two panels a row. best: the figure and the step that get a star.

        False without matplotlib or a folder.
        """
        canvas = None if self._path is None else curves(self.lines, panels, title, best)
        if self._path is None or canvas is None:
            return False
        save_canvas(canvas, self._path.with_name(CURVES))
        return True


def curves(
    lines: Sequence[dict[str, Any]], panels: Sequence[Panel], title: str, best: tuple[str, int] | None = None
) -> Any:
    """The figure of matplotlib that `MetricsLog.draw` writes; None without matplotlib or lines."""
    rows = -(-len(panels) // 2)
    canvas = canvas_of(10, 0.4 + (3.6 if rows == 1 else 3 * rows)) if lines else None
    if canvas is None:
        return None
    canvas.suptitle(title)
    axes = canvas.subplots(rows, 2, sharex=True, squeeze=False)
    for place, panel in zip(axes.flat, panels, strict=True):
        _plot(place, lines, panel, best)
    for place in axes[-1]:
        place.set_xlabel("epoch")
    return canvas


def _plot(axes: Any, lines: Sequence[dict[str, Any]], panel: Panel, best: tuple[str, int] | None) -> None:
    """Training and validation of one figure in two colours; several figures in as many."""
    found = dict.fromkeys(name for line in lines for name in line if any(fnmatchcase(name, n) for n in panel.names))
    names = sorted(found, key=lambda name: name.startswith("val_"))
    axes.set_title(panel.title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.margins(y=0.12)  # room for the last value
    if not names:
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes, color="grey")
    pair = len({name.removeprefix("val_") for name in names}) == 1
    for name in names:
        points = [(line["epoch"], line[name], line["step"]) for line in lines if name in line]
        x, y, steps = zip(*points, strict=True)
        measured = name.startswith("val_")
        colour = ("tab:orange" if measured else "tab:blue") if pair else None
        marker = "o" if measured or len(points) == 1 else None
        label = ("validation" if measured else "training") if pair else name.removeprefix("loss_").replace("_", " ")
        (drawn,) = axes.plot(x, y, color=colour, marker=marker, ms=4, lw=1.5, label=label, zorder=3 if measured else 2)
        starred = best is not None and best[0] == name and best[1] in steps
        if best is not None and starred:
            at = steps.index(best[1])
            axes.plot(
                x[at], y[at], "*", color=drawn.get_color(), mec="black", ms=13, zorder=4, label=f"best, {y[at]:.4g}"
            )
        if len(points) < 30 and len(names) == 1 and not starred:
            axes.annotate(
                f"{y[-1]:.3g}", (x[-1], y[-1]), textcoords="offset points", xytext=(0, 6), ha="right", fontsize=8
            )
    if len(axes.lines) > 1:  # several figures, or one with a star
        axes.legend(fontsize=8)


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines; a last one cut short by a crash is left out."""
    found = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
            line["step"] + 0
        except (ValueError, KeyError, TypeError):
            break
        found.append(line)
    return found
