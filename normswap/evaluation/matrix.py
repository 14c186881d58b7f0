"""The confusion matrix as a file: a table, or a picture."""

from __future__ import annotations

import csv
from pathlib import Path

from ..errors import NormswapError, OptionError
from ..files.spreadsheets import cell
from ..files.writing import atomic
from ..finetuning.output.by_class import matrix
from ..finetuning.output.plots import canvas_of, confusion_page
from .report import EvaluationReport


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
    confusion_page(path, *matrix(report))
