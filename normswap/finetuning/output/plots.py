"""Pictures in a run's folder: what matplotlib needs to draw one, and pages of examples."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.writing import atomic
from .by_class import ByClass, matrix
from .layout import CONFUSION

SURE = 0.5
"""The least score of a box that is drawn."""
_PAIRS = 2  # pictures in a row
_NAMED, _WRITTEN = 60, 20  # classes up to which a matrix has their names, and the number of each cell


def canvas_of(width: float, height: float) -> Any:
    """A figure of so many inches that belongs to no window; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    canvas = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas


def save_canvas(canvas: Any, path: Path) -> None:
    """As a PNG, whole or not at all. Raises OutputError."""
    with atomic(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=110)


def png(canvas: Any) -> bytes:
    """The same in memory."""
    file = BytesIO()
    canvas.savefig(file, format="png", dpi=110)
    return file.getvalue()


def boxes_page(
    path: Path, images: Sequence[Tensor], truths: Sequence[Any], found: Sequence[Any], names: Sequence[str]
) -> bool:
    """Images `(3, H, W)` in [0, 1] with their true boxes, and beside each the same with those predicted.

    truths, found: dicts of boxes, labels and, if any, masks `(n, H, W)`; found also has scores. names: of label 1, 2,
    ...; without them the labels' numbers are shown. False without matplotlib.
    """
    rows = -(-len(images) // _PAIRS)
    canvas = canvas_of(11, 2.9 * rows)
    if canvas is None:
        return False
    axes = canvas.subplots(rows, 2 * _PAIRS, squeeze=False).flat
    for place in axes:
        place.axis("off")
    for i, image in enumerate(images):
        sure = found[i]["scores"] > SURE
        kept = {k: v[sure] for k, v in found[i].items() if k in ("boxes", "labels", "scores", "masks")}
        masked = "masks" in kept  # true masks are of no interest where none are predicted
        second = "predicted" if len(kept["labels"]) else f"predicted: none above {SURE:g}"
        for place, title, target in ((axes[2 * i], "true", truths[i]), (axes[2 * i + 1], second, kept)):
            place.set_title(title, fontsize=9)
            place.imshow(_with_objects(image, target, masked).permute(1, 2, 0).numpy())
            _write_labels(place, target, names)
    save_canvas(canvas, path)
    return True


def masks_page(
    path: Path, images: Sequence[Tensor], truths: Sequence[Tensor], found: Sequence[Tensor], names: Sequence[str]
) -> bool:
    """Images `(3, H, W)`, beside each its true classes `(H, W)` and those predicted. False without matplotlib.

    The images are stretched to [0, 1]. Pixels of class 255 are black. names: of class 0, 1, ...
    """
    from ...data.segmentation_masks import IGNORED

    canvas = canvas_of(9, 0.5 + 1.75 * -(-len(images) // 2))
    if canvas is None:
        return False
    axes = canvas.subplots(-(-len(images) // 2), 6, squeeze=False).flat
    shown: set[int] = set()
    for place in axes:
        place.axis("off")
    for i, image in enumerate(images):
        low, high = float(image.min()), float(image.max())
        axes[3 * i].imshow(_in_colour((image.float() - low) / max(high - low, 1e-6)).permute(1, 2, 0).numpy())
        for place, title, mask in ((axes[3 * i + 1], "true", truths[i]), (axes[3 * i + 2], "predicted", found[i])):
            colours = _colours(int(mask.max()) + 1)[mask.cpu()]
            colours[mask.cpu() == IGNORED] = 0
            place.imshow(colours.numpy(), interpolation="nearest")
            place.set_title(title, fontsize=9)
            shown |= set(mask.unique().tolist()) - {IGNORED}
    _legend(canvas, sorted(shown), names)
    save_canvas(canvas, path)
    return True


def confusion_page(path: Path, names: Sequence[str], rows: Sequence[Sequence[int]]) -> bool:
    """A confusion matrix, a row for each true class, in shares of it. False without matplotlib."""
    canvas = confusion(names, rows)
    if canvas is not None:
        save_canvas(canvas, path)
    return canvas is not None


def confusion(names: Sequence[str], rows: Sequence[Sequence[int]]) -> Any:
    """The figure of matplotlib that `confusion_page` writes; None without matplotlib."""
    side = min(14.0, 2.5 + 0.4 * len(names))
    canvas = canvas_of(side + 0.8, side)
    if canvas is None:
        return None
    axes = canvas.subplots()
    shares = [[count / max(sum(row), 1) for count in row] for row in rows]
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    canvas.colorbar(drawn, label="share of the true class", shrink=0.8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= _NAMED:
        axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), [_short(name) for name in names], parse_math=False)
    if len(names) <= _WRITTEN:
        for i, row in enumerate(rows):
            for j, count in enumerate(row):
                colour = "white" if shares[i][j] > 0.5 else "black"
                axes.text(j, i, _brief(count), ha="center", va="center", color=colour, fontsize=8)
    return canvas


def write_matrix(folder: Path, found: ByClass) -> None:
    """confusion.png, where there is a matrix and matplotlib."""
    if found.confusion:
        confusion_page(folder / CONFUSION, *matrix(found))


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _brief(count: int) -> str:
    """At most five characters, as pixels are many."""
    if count < 10_000:
        return str(count)
    return f"{count / 1e3:.0f}k" if count < 1_000_000 else f"{count / 1e6:.3g}M"


def _in_colour(image: Tensor) -> Tensor:
    """`(3, H, W)` from any number of channels, on the CPU: their mean as grey, unless there are three."""
    image = image.float().cpu()
    return image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)


def _legend(canvas: Any, classes: Sequence[int], names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    palette = _colours(max(classes, default=0) + 1)
    patches: list[Any] = [Patch(color=tuple(palette[c].tolist()), label=_name(c, names, first=0)) for c in classes[:20]]
    canvas.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 10) or 1, fontsize=8)


def _with_objects(image: Tensor, target: Any, masked: bool) -> Tensor:
    """uint8 `(3, H, W)` with the boxes, and the masks laid over it by half, in the colours of the labels."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    picture: Tensor = (_in_colour(image).clamp(0, 1) * 255).round().to(torch.uint8)
    if not len(target["labels"]):
        return picture
    labels = target["labels"].cpu()
    palette = (_colours(int(labels.max()) + 1)[labels] * 255).round().int().tolist()
    colours: list[Any] = [tuple(colour) for colour in palette]
    if masked and "masks" in target:
        masks = target["masks"].cpu().reshape(-1, *picture.shape[1:]) > 0.5
        picture = draw_segmentation_masks(picture, masks, alpha=0.5, colors=colours)
    width = max(1, round(min(picture.shape[1:]) / 120))
    return draw_bounding_boxes(picture, target["boxes"].cpu(), colors=colours, width=width)


def _write_labels(axes: Any, target: Any, names: Sequence[str]) -> None:
    """By matplotlib: the letters of torchvision's boxes are of one size whatever the size of the image."""
    labels, scores = target["labels"].tolist(), target.get("scores")
    palette = _colours(max(labels, default=0) + 1)
    for i, (x1, y1, _, _) in enumerate(target["boxes"].tolist()):
        text = _name(labels[i], names, first=1) + ("" if scores is None else f" {float(scores[i]):.2f}")
        style = {"facecolor": palette[labels[i]].tolist(), "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        above = y1 > 0.08 * axes.get_ylim()[0]  # else it would lie outside the picture
        y, side = (y1 - 1.5, "bottom") if above else (y1 + 1, "top")
        axes.text(x1, y, text, fontsize=6.5, color="black", va=side, bbox=style, clip_on=True)


def _name(number: int, names: Sequence[str], *, first: int) -> str:
    return names[number - first] if 0 <= number - first < len(names) else str(number)


def _colours(count: int) -> Tensor:
    """`(count, 3)` in [0, 1], far apart for small numbers; 0, the background, is grey."""
    from matplotlib import colormaps

    maps: list[Any] = [colormaps["tab10"], colormaps["tab20b"]]
    wheel = torch.tensor([colour for each in maps for colour in each.colors])
    numbers = torch.arange(count)
    found = wheel[(numbers - 1) % len(wheel)]
    found[numbers == 0] = 0.75
    return found
