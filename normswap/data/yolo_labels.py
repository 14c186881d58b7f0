"""One label file of YOLO's: a line for each object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_ROUNDED = 0.01  # how far beyond 0 or 1 a share may lie


def labels_of(
    file: Path, classes: int, size: tuple[int, int], *, polygons: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of a file, as COCO's annotations have them, and what is wrong, a text with file and line for each.

    size: the image's width and height in pixels. polygons: whether every object has to be one.
    """
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        return [], [f"{file}: it cannot be read as text ({getattr(error, 'strerror', None) or error})"]
    found, problems = [], []
    for number, line in enumerate(lines, start=1):
        try:
            found += [_object(line.split(), classes, size, polygons)] if line.strip() else []
        except ValueError as error:
            problems.append(f"{file}, line {number}: {error}")
    return found, problems


def _object(words: list[str], classes: int, size: tuple[int, int], polygons: bool) -> dict[str, Any]:
    """Raises ValueError that says what is wrong."""
    try:
        number, *values = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{' '.join(words)[:40]!r} is not made of numbers") from None
    if not number.is_integer():
        raise ValueError(f"the class is {words[0]}, not a whole number")
    if not 0 <= number < classes:
        raise ValueError(f"class {number:.0f} is not one of the {classes} that are named, 0 to {classes - 1}")
    box = len(values) == 4
    if not box and (len(values) < 6 or len(values) % 2):
        raise ValueError(
            f"{len(values)} numbers after the class; a box has 4, a polygon 2 for each of 3 points or more"
        )
    outside = next(
        (word for word, v in zip(words[1:], values, strict=True) if not -_ROUNDED <= v <= 1 + _ROUNDED), None
    )
    if outside is not None:
        raise ValueError(f"{outside} is not a share of the image's width or height, from 0 to 1")
    if box and polygons:
        raise ValueError("a box, where a network that predicts masks needs a polygon")
    found: dict[str, Any] = {"category_id": int(number), "bbox": _box(values, size) if box else _around(values, size)}
    if not box:
        found["segmentation"] = [[value * size[i % 2] for i, value in enumerate(values)]]
    return found


def _box(values: list[float], size: tuple[int, int]) -> list[float]:
    """x, y, width, height in pixels, x and y of the corner."""
    x, y, width, height = values
    return [(x - width / 2) * size[0], (y - height / 2) * size[1], width * size[0], height * size[1]]


def _around(values: list[float], size: tuple[int, int]) -> list[float]:
    """The same, of the box around a polygon."""
    x, y = ([value * side for value in values[i::2]] for i, side in enumerate(size))
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]
