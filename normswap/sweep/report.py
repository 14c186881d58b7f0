"""The result of a comparison, as rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..display.overview import ReportInNotebook, Table
from ..errors import plural
from ..evaluation.report import FIGURES
from ..files.spreadsheets import cell
from ..files.writing import atomic
from .cells import CellResult

TABLES = ("table.csv", "table.json", "table.md")


@dataclass(frozen=True)
class ComparisonReport(ReportInNotebook):
    """results: of all cells in their order, failed ones with an error. folder: what was written lies there.

    figure: what was compared, `accuracy`, `map` or `miou`. baseline: that of the network as it came, where it was
    measured. pictures: files. planned: how many cells there are, those of before included; fewer results where it was
    stopped. notes: how the data was taken.
    """

    results: tuple[CellResult, ...]
    folder: Path
    planned: int
    baseline: float | None = None
    pictures: tuple[Path, ...] = ()
    interrupted: bool = False
    figure: str = "accuracy"
    notes: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """What the figure is called."""
        return FIGURES[self.figure]

    @property
    def rests_on(self) -> str:
        """How many images the figures rest on; empty where there is none."""
        counts = {result.evaluated for result in self.results if result.evaluated}
        if not counts:
            return ""
        images = plural(min(counts), "validation image") + f" to {max(counts)}" * (len(counts) > 1)
        text = f"{self.told} on {images}"
        if self.figure == "accuracy":
            text += f", of which one makes {1 / min(counts):.4f}"
        used = {result.images for result in self.results if result.images and result.cell.batch_size is None}
        return text + (f"; calibrated on {max(used)} training images" if used else "")

    @property
    def failed(self) -> tuple[CellResult, ...]:
        """Those that have an error."""
        return tuple(result for result in self.results if result.error)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "folder": str(self.folder),
            "figure": self.figure,
            "baseline": self.baseline,
            "rests_on": self.rests_on,
            "notes": list(self.notes),
            "planned": self.planned,
            "interrupted": self.interrupted,
            "cells": [result.to_dict() for result in self.results],
            "pictures": [str(path) for path in self.pictures],
        }

    def table(self) -> Table:
        """One row for each cell; columns that no cell has are left out."""
        trained = any(result.cell.batch_size is not None for result in self.results)
        columns = ["norm", ">groups", *([">batch"] if trained else [">converted"]), f">{self.told}"]
        columns += [">best", ">images"] if trained else []
        return Table((*columns, "note"), tuple(_row(result, trained) for result in self.results))

    def __str__(self) -> str:
        return "\n".join(filter(None, [str(self.table()), self.rests_on]))


def _row(result: CellResult, trained: bool) -> tuple[str, ...]:
    cell = result.cell
    groups = "" if cell.groups is None else str(cell.groups)
    middle = [str(cell.batch_size)] if trained else [_share(result.converted)]
    more = [_share(result.best), str(result.images or "")] if trained else []
    return (cell.norm, groups, *middle, _share(result.score), *more, result.error or result.note)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def write_tables(report: ComparisonReport) -> None:
    """`table.csv`, `table.json` and `table.md` in the folder of the comparison. Raises OutputError."""
    texts = (_csv(report.results), json.dumps(report.to_dict(), indent=2) + "\n", _markdown(report.table()))
    for name, text in zip(TABLES, texts, strict=True):
        with atomic(report.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _csv(results: Sequence[CellResult]) -> str:
    out = io.StringIO()
    rows = [result.to_dict() for result in results]
    writer = csv.DictWriter(out, list(rows[0]) if rows else ["norm"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def _markdown(table: Table) -> str:
    sides = ["---:" if title.startswith(">") else "---" for title in table.columns]
    rows = [[title.lstrip(">") for title in table.columns], sides]
    rows += [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in table.rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
