"""The confusion matrix as a file: a table, or a picture."""

from __future__ import annotations

import csv
from pathlib import Path

from ..errors import NormswapError, OptionError
from ..files.spreadsheets import cell
from ..files.writing import atomic
from ..finetuning.output.plots import canvas_of, save_canvas
from .report import EvaluationReport, matrix

_WRITTEN = 20  # classes up to which each number of the picture is written


def check_matrix(task: str, path: Path) -> None:
    """Raise OptionError for a task without a matrix, and NormswapError for a picture without matplotlib."""
    if task == "detection":
        raise OptionError("detection has no confusion matrix", hint="A name that ends in .json gets all figures.")
    if path.suffix.lower() == ".png" and canvas_of(1, 1) is None:
        raise NormswapError("a picture needs matplotlib", hint="pip install 'normswap[plot]'")


def write_csv(report: EvaluationReport, path: Path) -> None:
    """A row for each true class, a column for each predicted one; see `check_matrix`."""
    names, rows = matrix(report)
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *map(cell, names)])
        writer.writerows([cell(name), *row] for name, row in zip(names, rows, strict=True))


def write_picture(report: EvaluationReport, path: Path) -> None:
    """A PNG, each row in shares of its true class; see `check_matrix`."""
    names, rows = matrix(report)
    side = min(14.0, 2.5 + 0.4 * len(names))
    canvas = canvas_of(side + 0.8, side)
    axes = canvas.subplots()
    shares = [[count / max(sum(row), 1) for count in row] for row in rows]
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    canvas.colorbar(drawn, label="share of the true class", shrink=0.8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= 60:
        axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), [_short(name) for name in names], parse_math=False)
    if len(names) <= _WRITTEN:
        for i, row in enumerate(rows):
            for j, count in enumerate(row):
                colour = "white" if shares[i][j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)
    save_canvas(canvas, path)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
