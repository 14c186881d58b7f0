"""COCO's annotation file: its three lists, read and checked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError, listed

_LARGEST = 2**20  # pixels of a side
_FARTHEST = 1e7
_TABLES = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
_SEE = "The format is described at https://cocodataset.org/#format-data."


def tables_of(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The three lists of the file, each entry with the keys that are needed, and no id twice."""
    content = _json(file)
    missing = [name for name in _TABLES if not (isinstance(content, dict) and isinstance(content.get(name), list))]
    if missing:
        raise DataError(f"{file} is not a COCO detection file: it has no list {_or(missing)}", hint=_SEE)
    for name, keys in _TABLES.items():
        _refuse(file, content[name], partial(_lacks, keys), f"entries of {name} are incomplete")
        ids = Counter(entry["id"] for entry in content[name] if "id" in entry)
        twice = [f"id {number}" for number, count in ids.items() if count > 1]
        if twice:
            raise DataError(listed(f"{file}: {name} has ids that are given more than once:", twice))
    for name in ("images", "categories"):
        if not content[name]:
            raise DataError(f"{file} lists no {name}", hint=_SEE)
    _refuse(file, content["images"], _bad_image, "images are unusable")
    return {name: content[name] for name in _TABLES}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no annotation file {file}") from None
    except OSError as error:
        hint = "The annotation file comes first, the folder of its images second." if file.is_dir() else None
        raise DataError(f"{file} cannot be read: {error.strerror or error}", hint=hint) from error
    except (ValueError, RecursionError) as error:  # json's own error, or text that is not UTF-8
        raise DataError(f"{file} is not JSON: {error}", hint=_SEE) from error


def _lacks(keys: Sequence[str], entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"it is {json.dumps(entry)[:40]}, not an object"
    missing = [key for key in keys if key not in entry]
    if missing:
        return f"no {_or(missing)}"
    wrong = [k for k in ("id", *keys) if k in entry and (k == "id" or k.endswith("_id")) and type(entry[k]) is not int]
    return f"its {wrong[0]} is {entry[wrong[0]]!r}, not a whole number" if wrong else ""


def _bad_image(entry: dict[str, Any]) -> str:
    if not isinstance(entry["file_name"], str) or not entry["file_name"]:
        return f"its file_name is {entry['file_name']!r}"
    sizes = [entry["width"], entry["height"]]
    return "" if all(type(s) is int and 0 < s < _LARGEST for s in sizes) else f"its width and height are {sizes}"


def check_links(file: Path, annotations: list[dict[str, Any]], images: dict[int, Any], labels: dict[int, Any]) -> None:
    """Raise DataError for annotations of images or categories that are not listed."""
    for key, known in (("image_id", images), ("category_id", labels)):
        what = "images" if known is images else "categories"
        _refuse(file, annotations, partial(_dangling, key, known), f"annotations name {what} that it does not list")


def _dangling(key: str, known: dict[int, Any], annotation: dict[str, Any]) -> str:
    return "" if annotation[key] in known else f"{key} {annotation[key]}"


def check_boxes(file: Path, annotations: list[dict[str, Any]]) -> None:
    """Raise DataError for boxes that are not four numbers."""
    _refuse(file, annotations, _bad_box, "annotations have no usable box")


def check_masks(file: Path, annotations: list[dict[str, Any]]) -> None:
    """Raise DataError for annotations without a mask."""
    _refuse(file, annotations, lambda a: "" if a.get("segmentation") else "no segmentation", "annotations have no mask")


def _bad_box(annotation: dict[str, Any]) -> str:
    box = annotation["bbox"]
    fine = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    return "" if fine else f"its bbox is {box!r}, not four numbers x, y, width, height"


def is_number(value: Any) -> bool:
    """A number that a pixel may have, which JSON's `true` and `NaN` are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_FARTHEST <= value <= _FARTHEST


def _refuse(file: Path, entries: Iterable[Any], wrong_with: Callable[[Any], str], what: str) -> None:
    """Raise DataError that counts the entries with something wrong, and names the first ones by their id or place."""
    problems = []
    for place, entry in enumerate(entries):
        if problem := wrong_with(entry):
            known = isinstance(entry, dict) and "id" in entry
            problems.append((f"id {entry['id']}" if known else f"number {place + 1}") + f": {problem}")
    if problems:
        raise DataError(listed(f"{file}: {len(problems)} {what}:", problems), hint=_SEE)


def _or(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)
