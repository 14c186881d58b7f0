"""Pictures of a comparison: accuracy over groups, error over the batch size, training curves of every norm."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..finetuning.output.layout import METRICS
from ..finetuning.output.plots import canvas_of, save_canvas
from .cells import CellResult

_LOSSES = {"loss": "training loss", "val_loss": "validation loss"}
_CURVES = {
    "accuracy": {**_LOSSES, "accuracy": "training accuracy", "val_accuracy": "validation accuracy"},
    "map": {
        "loss": "training loss",
        "val_map": "validation mAP",
        "val_map_50": "validation mAP at IoU 0.5",
        "val_map_75": "validation mAP at IoU 0.75",
    },
    "miou": {**_LOSSES, "val_miou": "validation mean IoU", "val_pixel_accuracy": "validation pixel accuracy"},
}
"""What the four panels show, by what is compared."""


def draw(results: Sequence[CellResult], folder: Path, title: str, told: str) -> tuple[Path, ...]:
    """Those pictures that there is something to show of; none without matplotlib. told: what the figure is called.

    Raises OutputError.
    """
    done = [result for result in results if result.score is not None]
    calibrated = [result for result in done if result.cell.batch_size is None]
    trained = [result for result in done if result.cell.batch_size is not None]
    figure = done[0].figure if done else ""
    found = [_over_groups(calibrated, folder / f"{figure}-over-groups.png", title, told)] if calibrated else []
    if trained:
        name = "error" if figure == "accuracy" else figure
        found.append(_over_batches(trained, folder / f"{name}-over-batch-size.png", title, told))
        for size in sorted({result.cell.batch_size or 0 for result in trained}):
            group = [result for result in trained if result.cell.batch_size == size]
            found.append(_curves(group, folder / f"curves-batch-{size}.png", f"{title}, batch size {size}"))
    return tuple(path for path in found if path is not None)


def _over_groups(results: Sequence[CellResult], path: Path, title: str, told: str) -> Path | None:
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
            axes.plot(x, [r.score for _, r in numbered], "o-", color=colours[norm], label=f"{norm}, calibrated")
            style = {"ls": ":", "marker": "o", "mfc": "white"}
            axes.plot(x, [r.converted for _, r in numbered], color=colours[norm], label=f"{norm}, converted", **style)
        for result in mine:
            if not isinstance(result.cell.groups, int) and result.score is not None:
                axes.axhline(result.score, color=colours[norm], ls="--", lw=1.2, label=result.cell.series)
    _finish(axes, title, "groups", f"{told} on the validation images", sorted(counts))
    save_canvas(canvas, path)
    return path


def _over_batches(results: Sequence[CellResult], path: Path, title: str, told: str) -> Path | None:
    """After the first figure of Wu and He 2018: batches growing smaller to the right, and of accuracies the error."""
    canvas = canvas_of(7, 4.4)
    if canvas is None:
        return None
    axes = canvas.subplots()
    names = list(dict.fromkeys(result.cell.series for result in results))
    colours = _colours(names)
    for name in names:
        mine = [result for result in results if result.cell.series == name]
        points = [(r.cell.batch_size or 0, 100 * (1 - r.accuracy) if r.accuracy is not None else r.score) for r in mine]
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "o-", color=colours[name], label=name)
    sizes = sorted({result.cell.batch_size or 0 for result in results})
    what = (
        "error on the validation images, %" if results[0].figure == "accuracy" else f"{told} on the validation images"
    )
    _finish(axes, title, "batch size (images a GPU)", what, sizes)
    axes.invert_xaxis()
    save_canvas(canvas, path)
    return path


def _curves(results: Sequence[CellResult], path: Path, title: str) -> Path | None:
    """Four panels with a line for each norm."""
    canvas = canvas_of(10, 6.4)
    if canvas is None:
        return None
    canvas.suptitle(title)
    places = canvas.subplots(2, 2, sharex=True)
    colours = _colours([result.cell.series for result in results])
    for axes, (figure, told) in zip(places.flat, _CURVES[results[0].figure].items(), strict=True):
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
