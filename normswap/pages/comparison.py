"""What `compare` prints with --json -> its table and its curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.report import FIGURES
from ..finetuning.output.layout import METRICS
from ..finetuning.output.metrics_log import read_lines
from .charts import COLOURS, Series, line_chart
from .parts import Chart, number

Row = Mapping[str, Any]


def comparison_table(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column titles, and a row for each cell; columns that no cell has are left out."""
    figure = values["figure"]
    columns = {"norm": "norm", "groups": "groups", "batch_size": "batch", "converted": "converted"}
    columns |= {figure: FIGURES[figure], "best": "best"}
    kept = [key for key in columns if any(cell[key] is not None for cell in values["cells"])]
    noted = any(cell["error"] or cell["note"] for cell in values["cells"])
    rows = [
        [*(number(cell[key]) for key in kept), *([cell["error"] or cell["note"]] if noted else [])]
        for cell in values["cells"]
    ]
    return [*(columns[key] for key in kept), *(["note"] if noted else [])], rows


def comparison_charts(values: Mapping[str, Any]) -> Iterator[Chart]:
    """The figure over the groups, or over the batch size and, with each batch size, over the epochs."""
    figure = values["figure"]
    done = [cell for cell in values["cells"] if cell[figure] is not None]
    calibrated = [cell for cell in done if cell["batch_size"] is None]
    trained = [cell for cell in done if cell["batch_size"] is not None]
    if any(isinstance(cell["groups"], int) for cell in calibrated):
        yield _over_groups(calibrated, figure)
    sizes = sorted({cell["batch_size"] for cell in trained})
    if len(sizes) > 1:
        yield _over_batches(trained, figure)
    for size in sizes:
        yield from _curves([cell for cell in trained if cell["batch_size"] == size], figure, size)


def _over_groups(cells: Sequence[Row], figure: str) -> Chart:
    """Right after the conversion and calibrated; a level line for each norm without groups."""
    counts = sorted({cell["groups"] for cell in cells if isinstance(cell["groups"], int)})
    lines: list[tuple[str, list[tuple[float, float]]]] = []
    for norm in dict.fromkeys(cell["norm"] for cell in cells):
        mine = [cell for cell in cells if cell["norm"] == norm]
        grouped = sorted((c for c in mine if isinstance(c["groups"], int)), key=lambda cell: cell["groups"])
        for key, told in ((figure, "calibrated"), ("converted", "converted")):
            if grouped:
                lines.append((f"{norm}, {told}", [(math.log2(c["groups"]), c[key]) for c in grouped]))
        for cell in mine:
            if cell not in grouped:
                ends = [math.log2(counts[0]), math.log2(counts[-1])]
                lines.append((_series(cell), [(x, cell[figure]) for x in ends]))
    labels = [(math.log2(count), str(count)) for count in counts]
    svg = line_chart(_coloured(lines), x="groups", y=FIGURES[figure], dots=True, labels=labels)
    return Chart(f"{_title(figure)} over the number of groups", "On the validation images.", svg)


def _over_batches(cells: Sequence[Row], figure: str) -> Chart:
    error = figure == "accuracy"
    lines = [
        (name, sorted((math.log2(c["batch_size"]), 1 - c[figure] if error else c[figure]) for c in mine))
        for name, mine in _by_series(cells).items()
    ]
    labels = [(math.log2(size), str(size)) for size in sorted({cell["batch_size"] for cell in cells})]
    what = "error" if error else FIGURES[figure]
    svg = line_chart(_coloured(lines), x="batch size", y=what, dots=True, labels=labels)
    text = "On the validation images, as in the first figure of Wu and He 2018."
    return Chart(f"{what[0].upper()}{what[1:]} over the batch size", text, svg)


def _curves(cells: Sequence[Row], figure: str, size: int) -> Iterator[Chart]:
    """Of each run, from its folder."""
    logs = {_series(cell): _log(cell) for cell in cells}
    for key in ("loss", "val_loss", figure, f"val_{figure}"):
        lines = [(name, [(line["epoch"], line[key]) for line in log if key in line]) for name, log in logs.items()]
        drawn = [line for line in lines if line[1]]
        if not drawn:
            continue
        part = "validation" if key.startswith("val_") else "training"
        what = "loss" if key.endswith("loss") else FIGURES[figure]
        svg = line_chart(_coloured(drawn), x="epoch", y=what)
        yield Chart(f"Batch size {size}: {part} {what}", "A line for each norm.", svg)


def _log(cell: Row) -> list[dict[str, Any]]:
    place = Path(cell["folder"] or "") / METRICS
    return read_lines(place) if cell["folder"] and place.is_file() else []


def _by_series(cells: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for cell in cells:
        found.setdefault(_series(cell), []).append(cell)
    return found


def _series(cell: Row) -> str:
    return cell["norm"] if cell["groups"] is None else f"{cell['norm']}-{cell['groups']}"


def _coloured(lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> list[Series]:
    return [Series(name, points, i % COLOURS + 1) for i, (name, points) in enumerate(lines)]


def _title(figure: str) -> str:
    told = FIGURES[figure]
    return told if figure == "map" else told[0].upper() + told[1:]
