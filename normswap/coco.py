"""Detection data in the COCO format: an annotation file and a folder of images -> images and targets."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError, listed
from .images import Unreadable, decode
from .masks import is_number, mask_of
from .preprocess import Preprocess

_LARGEST = 2**20  # pixels of a side
_LOOK_AHEAD = 2000  # how many images more are tried once one is unreadable, so as to report them together
_TABLES = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
_SEE = "The format is described at https://cocodataset.org/#format-data."


@dataclass(frozen=True)
class Picture:
    """One image: its COCO id, its name below the folder, its size, and what it shows.

    boxes: x1, y1, x2, y2 in pixels; labels from 1; segmentations as COCO has them, empty unless masks are wanted.
    crowds: regions with many objects that are not told apart, likewise.
    """

    id: int
    name: str
    width: int
    height: int
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    labels: tuple[int, ...] = ()
    segmentations: tuple[Any, ...] = ()
    crowds: Picture | None = None

    def with_crowds(self) -> Picture:
        """With the crowds behind the objects."""
        if self.crowds is None:
            return self
        boxes, labels = self.boxes + self.crowds.boxes, self.labels + self.crowds.labels
        return replace(self, boxes=boxes, labels=labels, segmentations=self.segmentations + self.crowds.segmentations)


@dataclass(frozen=True)
class CocoData(Dataset[tuple[Tensor, dict[str, Any]]]):
    """What `open_coco` returns.

    An item is `(image, target)` in the convention of torchvision's detectors. image: float32 `(3, H, W)` in [0, 1];
    boxes: float32 `(n, 4)`, x1, y1, x2, y2 in pixels, n = 0 for an image without objects; labels: int64 `(n,)`;
    image_id: COCO's; masks, where they were asked for: uint8 `(n, H, W)`.

    categories: the name of label 1, 2, ...; category_ids: COCO's number for each of them. notes: what was left out or
    changed on reading, a sentence each. crowds: whether targets have them too, behind the objects, and iscrowd, int64
    `(n,)`, 1 for a crowd: a detector is not trained on them, and mAP does not count what it finds there.
    """

    annotations: Path
    folder: Path
    pictures: tuple[Picture, ...]
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    masks: bool = False
    notes: tuple[str, ...] = ()
    crowds: bool = False

    def __len__(self) -> int:
        return len(self.pictures)

    def __str__(self) -> str:
        boxes = sum(len(p.boxes) for p in self.pictures)
        return f"{self.annotations}: {len(self)} images, {boxes} boxes in {len(self.categories)} categories"

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Raises DataError, naming up to 10 of them, for images that cannot be read or are of another size."""
        try:
            return self.read(index)
        except Unreadable:
            raise self._unreadable(index % len(self)) from None

    def read(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """The same, but raises `images.Unreadable`, and looks at no other image."""
        picture = self.pictures[index]
        image = _read(self.folder, picture)
        objects = len(picture.boxes)
        picture = picture.with_crowds() if self.crowds else picture
        target: dict[str, Any] = {
            "boxes": torch.tensor(picture.boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(picture.labels, dtype=torch.int64),
            "image_id": picture.id,
        }
        if self.crowds:
            target["iscrowd"] = (torch.arange(len(picture.boxes)) >= objects).long()
        if self.masks:
            target["masks"] = self._masks(picture)
        return image, target

    def _masks(self, picture: Picture) -> Tensor:
        found = [torch.zeros(0, picture.height, picture.width, dtype=torch.uint8)]
        for number, segmentation in enumerate(picture.segmentations):
            try:
                found.append(mask_of(segmentation, picture.height, picture.width)[None])
            except ValueError as error:
                where = f"object {number + 1} of image {picture.name}"
                raise DataError(f"{self.annotations}: the segmentation of {where} is unusable: {error}") from None
        return torch.cat(found)

    def _unreadable(self, start: int) -> DataError:
        """One error for all that cannot be read among the next images."""
        pictures = self.pictures[start : start + _LOOK_AHEAD]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            reasons = pool.map(lambda p: _problem(self.folder, p), pictures)
            problems = [f"{p.name}: {reason}" for p, reason in zip(pictures, reasons, strict=True) if reason]
        summary = f"{len(problems)} of {len(pictures)} images in {self.folder} cannot be used:"
        return DataError(listed(summary, problems), hint="Replace them, or take them out of the annotation file.")


def open_coco(annotations: str | os.PathLike[str], folder: str | os.PathLike[str], *, masks: bool = False) -> CocoData:
    """Read a COCO annotation file; `folder` is where its `file_name`s begin. Reads no image yet.

    Category ids, which may have gaps, become labels 1, 2, ... in rising order (0 is the background of torchvision's
    detectors). Boxes are clipped to the image; boxes of zero size and crowds are left out; `notes` says how many.
    Images without objects stay. masks: targets get masks, from polygons or run lengths, compressed or not.

    Raises DataError, naming the file and up to 10 offenders, for what is not JSON or not COCO, ids that are given
    twice or refer to nothing, boxes that are not four numbers, missing segmentations, and missing image files.
    """
    file, folder = Path(annotations), Path(folder)
    tables = _tables(file)
    images = {entry["id"]: entry for entry in tables["images"]}
    categories = sorted((entry["id"], str(entry["name"])) for entry in tables["categories"])
    labels = {category: label for label, (category, _) in enumerate(categories, start=1)}
    _check_links(file, tables["annotations"], images, labels)
    single = [a for a in tables["annotations"] if not a.get("iscrowd")]
    crowded = [a for a in tables["annotations"] if a.get("iscrowd")]
    kept, notes = _kept(file, single, images, masks)
    crowds, _ = _kept(file, crowded, images, masks)
    notes += [f"{len(crowded)} crowds are left out of training"] * bool(crowded)
    _check_files(folder, [entry["file_name"] for entry in tables["images"]])
    pictures = tuple(_picture(entry, kept[entry["id"]], labels, masks) for entry in tables["images"])
    pictures = tuple(
        replace(p, crowds=_picture(entry, crowds[p.id], labels, masks)) if crowds[p.id] else p
        for p, entry in zip(pictures, tables["images"], strict=True)
    )
    empty = sum(not picture.boxes for picture in pictures)
    notes += [f"{empty} of {len(pictures)} images have no object"] * bool(empty)
    ids, names = tuple(i for i, _ in categories), tuple(name for _, name in categories)
    return CocoData(file, folder, pictures, names, ids, masks, tuple(notes))


# --- reading and checking the file --------------------------------------------------------------------------------


def _tables(file: Path) -> dict[str, list[dict[str, Any]]]:
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


def _check_links(file: Path, annotations: list[dict[str, Any]], images: dict[int, Any], labels: dict[int, int]) -> None:
    for key, known in (("image_id", images), ("category_id", labels)):
        what = "images" if known is images else "categories"
        _refuse(file, annotations, partial(_dangling, key, known), f"annotations name {what} that it does not list")


def _dangling(key: str, known: dict[int, Any], annotation: dict[str, Any]) -> str:
    return "" if annotation[key] in known else f"{key} {annotation[key]}"


def _kept(
    file: Path, annotations: list[dict[str, Any]], images: dict[int, Any], masks: bool
) -> tuple[dict[int, list[dict[str, Any]]], list[str]]:
    """The annotations of each image with their boxes clipped, and notes on what became of the others."""
    _refuse(file, annotations, _bad_box, "annotations have no usable box")
    kept: dict[int, list[dict[str, Any]]] = defaultdict(list)
    clipped = dropped = 0
    for annotation in annotations:
        image = images[annotation["image_id"]]
        whole = _corners(annotation["bbox"])
        box = _clipped(whole, image["width"], image["height"])
        if box[2] <= box[0] or box[3] <= box[1]:
            dropped += 1
            continue
        clipped += any(abs(a - b) > 0.5 for a, b in zip(whole, box, strict=True))
        kept[annotation["image_id"]].append({**annotation, "bbox": box})
    if masks:
        listed = [a for found in kept.values() for a in found]
        _refuse(file, listed, lambda a: "" if a.get("segmentation") else "no segmentation", "annotations have no mask")
    counts = {
        "boxes of zero size inside their image are left out": dropped,
        "boxes reached outside their image and are clipped": clipped,
    }
    return kept, [f"{count} {what}" for what, count in counts.items() if count]


def _bad_box(annotation: dict[str, Any]) -> str:
    box = annotation["bbox"]
    fine = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    return "" if fine else f"its bbox is {box!r}, not four numbers x, y, width, height"


def _corners(box: list[float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height


def _clipped(box: tuple[float, float, float, float], width: int, height: int) -> tuple[float, float, float, float]:
    """As float32 has it, which is what tensors hold."""
    x1, y1, x2, y2 = (float(np.float32(value)) for value in box)
    return max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2)


def _check_files(folder: Path, names: list[str]) -> None:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}", hint="Give the folder that holds the images.")
    present = {entry.name for entry in os.scandir(folder)}  # one look instead of one for each image
    missing = [name for name in names if name not in present and not (folder / name).is_file()]
    if missing:
        summary = f"{len(missing)} of {len(names)} images are not in {folder}:"
        raise DataError(listed(summary, missing), hint="Give the folder that the file_names are relative to.")


def _picture(entry: dict[str, Any], annotations: list[dict[str, Any]], labels: dict[int, int], masks: bool) -> Picture:
    return Picture(
        entry["id"],
        entry["file_name"],
        entry["width"],
        entry["height"],
        tuple(a["bbox"] for a in annotations),
        tuple(labels[a["category_id"]] for a in annotations),
        tuple(a["segmentation"] for a in annotations) if masks else (),
    )


# --- images -------------------------------------------------------------------------------------------------------


def _read(folder: Path, picture: Picture) -> Tensor:
    """float32 `(3, H, W)` in [0, 1]. Raises Unreadable."""
    image = Preprocess.raw()(decode(folder / picture.name))
    if image.shape[1:] != (picture.height, picture.width):
        height, width = image.shape[1:]
        raise Unreadable(f"it is {width} x {height}, the annotation file says {picture.width} x {picture.height}")
    return image


def _problem(folder: Path, picture: Picture) -> str:
    try:
        _read(folder, picture)
    except Unreadable as error:
        return str(error)
    return ""


# --- words --------------------------------------------------------------------------------------------------------


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
