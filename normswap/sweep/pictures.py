"""Pictures of a comparison: accuracy over groups, error over the batch size, training curves of every norm."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..finetuning.output.layout import METRICS
from ..finetuning.output.plots import canvas_of, save_canvas
from .cells import CellResult

_CURVES = {
    "loss": "training loss", "val_loss": "validation loss",
    "accuracy": "training accuracy", "val_accuracy": "validation accuracy",
}  # fmt: skip
GROUPS, BATCHES = "accuracy-over-groups.png", "error-over-batch-size.png"


def draw(results: Sequence[CellResult], folder: Path, title: str) -> tuple[Path, ...]:
    """Those pictures that there is something to show of; none without matplotlib. Raises OutputError."""
    done = [result for result in results if result.accuracy is not None]
    calibrated = [result for result in done if result.cell.batch_size is None]
    trained = [result for result in done if result.cell.batch_size is not None]
    found = [_over_groups(calibrated, folder / GROUPS, title)] if calibrated else []
    if trained:
        found.append(_over_batches(trained, folder / BATCHES, title))
        for size in sorted({result.cell.batch_size or 0 for result in trained}):
            group = [result for result in trained if result.cell.batch_size == size]
            found.append(_curves(group, folder / f"curves-batch-{size}.png", f"{title}, batch size {size}"))
    return tuple(path for path in found if path is not None)


def _over_groups(results: Sequence[CellResult], path: Path, title: str) -> Path | None:
    """Lines over the number of groups, converted and calibrated; a level line for each norm without groups."""
    canvas = canvas_of(7, 4.4)
    if canvas is None:
        return None
    axes = canvas.subplots()
    colours = _colours({result.cell.norm for result in results})
    counts: set[int] = set()
    for norm in dict.fromkeys(result.cell.norm for result in results):
        mine = [result for result in results if result.cell.norm == norm]
        numbered = sorted((r.cell.groups, r) for r in mine if isinstance(r.cell.groups, int))
        if numbered:
            x = [count for count, _ in numbered]
            counts |= set(x)
            axes.plot(x, [r.accuracy for _, r in numbered], "o-", color=colours[norm], label=f"{norm}, calibrated")
            style = {"ls": ":", "marker": "o", "mfc": "white"}
            axes.plot(x, [r.converted for _, r in numbered], color=colours[norm], label=f"{norm}, converted", **style)
        for result in mine:
            if not isinstance(result.cell.groups, int) and result.accuracy is not None:
                axes.axhline(result.accuracy, color=colours[norm], ls="--", lw=1.2, label=result.cell.series)
    _finish(axes, title, "groups", "accuracy on the validation images", sorted(counts))
    save_canvas(canvas, path)
    return path


def _over_batches(results: Sequence[CellResult], path: Path, title: str) -> Path | None:
    """After the first figure of Wu and He 2018: error in per cent, batches growing smaller to the right."""
    canvas = canvas_of(7, 4.4)
    if canvas is None:
        return None
    axes = canvas.subplots()
    names = list(dict.fromkeys(result.cell.series for result in results))
    colours = _colours(names)
    for name in names:
        points = [(r.cell.batch_size or 0, 100 * (1 - (r.accuracy or 0))) for r in results if r.cell.series == name]
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "o-", color=colours[name], label=name)
    sizes = sorted({result.cell.batch_size or 0 for result in results})
    _finish(axes, title, "batch size (images a GPU)", "error on the validation images, %", sizes)
    axes.invert_xaxis()
    save_canvas(canvas, path)
    return path


def _curves(results: Sequence[CellResult], path: Path, title: str) -> Path | None:
    """Loss and accuracy in training and validation, four panels with a line for each norm."""
    canvas = canvas_of(10, 6.4)
    if canvas is None:
        return None
    canvas.suptitle(title)
    places = canvas.subplots(2, 2, sharex=True)
    colours = _colours([result.cell.series for result in results])
    for axes, (figure, told) in zip(places.flat, _CURVES.items(), strict=True):
        axes.set_title(told, fontsize=10)
        axes.grid(alpha=0.3)
        for result in results:
            name = result.cell.series
            points = [(line["epoch"], line[figure]) for line in _lines(result) if figure in line]
            if points:
                x, y = zip(*points, strict=True)
                marker = "o" if figure.startswith("val_") else None
                axes.plot(x, y, color=colours[name], marker=marker, ms=4, lw=1.5, label=name)
    places.flat[0].legend(fontsize=8)
    for axes in places[-1]:
        axes.set_xlabel("epoch")
    save_canvas(canvas, path)
    return path


def _lines(result: CellResult) -> Iterator[dict[str, Any]]:
    """What a run wrote down."""
    if result.folder is None or not (result.folder / METRICS).is_file():
        return
    for text in (result.folder / METRICS).read_text(encoding="utf-8").splitlines():
        yield json.loads(text)


def _finish(axes: Any, title: str, x: str, y: str, ticks: Sequence[int]) -> None:
    if ticks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _colours(names: Any) -> dict[str, str]:
    """One for each, the same in every picture as long as the names are."""
    return {name: f"C{i % 10}" for i, name in enumerate(sorted(names))}
