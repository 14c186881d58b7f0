"""Images with boxes, whatever format they were written in: what the readers of COCO, YOLO and Pascal VOC give."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError, listed, plural
from .coco_masks import mask_of
from .decoding import Unreadable, decode
from .preprocess import Preprocess

_LOOK_AHEAD = 2000  # how many images more are tried once one is unreadable, so as to report them together

Entry = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """One image: its id, its name below the folder, its size, and what it shows.

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
class BoxData(Dataset[tuple[Tensor, dict[str, Any]]]):
    """What `open_coco`, `open_yolo` and `open_voc` return.

    An item is `(image, target)` in the convention of torchvision's detectors. image: float32 `(3, H, W)` in [0, 1];
    boxes: float32 `(n, 4)`, x1, y1, x2, y2 in pixels, n = 0 for an image without objects; labels: int64 `(n,)`;
    image_id: that of the file, or its place from 1; masks, where they were asked for: uint8 `(n, H, W)`.

    annotations: the file or folder that they were read from. categories: the name of label 1, 2, ...; category_ids: the
    file's number for each of them. notes: what was left out or changed on reading, a sentence each. crowds: whether
    targets have crowds (Pascal VOC: difficult objects) too, behind the objects, and iscrowd, int64 `(n,)`, 1 for a
    crowd: a detector is not trained on them, and mAP does not count what it finds there.
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
        counts = f"{plural(len(self), 'image')}, {boxes} box{'es' * (boxes != 1)}"
        return f"{self.annotations}: {counts} in {len(self.categories)} categories"

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Raises DataError, naming up to 10 of them, for images that cannot be read or are of another size."""
        try:
            return self.read(index)
        except Unreadable:
            raise self._unreadable(index % len(self)) from None

    def read(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """The same, but raises `Unreadable`, and looks at no other image."""
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


# --- from what a file says ----------------------------------------------------------------------------------------


def gathered(
    place: Path,
    folder: Path,
    images: Sequence[Entry],
    annotations: Sequence[Entry],
    categories: Sequence[tuple[int, str]],
    *,
    masks: bool = False,
    left_out: str = "crowds",
    check: Callable[[list[Entry]], None] = lambda kept: None,
) -> BoxData:
    """Images and annotations, entries as COCO has them, as data to train on.

    categories: number and name of each, in the order of the labels. left_out: what annotations with `iscrowd` are.
    check: raises for what is wrong with those annotations that are kept. Raises DataError for missing image files.
    """
    labels = {number: label for label, (number, _) in enumerate(categories, start=1)}
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in images}
    kept, notes = _inside([a for a in annotations if not a.get("iscrowd")], sizes)
    crowded = [a for a in annotations if a.get("iscrowd")]
    crowds, _ = _inside(crowded, sizes)
    check([a for found in (kept, crowds) for each in found.values() for a in each])
    notes += [f"{len(crowded)} {left_out} are left out of training"] * bool(crowded)
    check_files(folder, [entry["file_name"] for entry in images])
    pictures = [_picture(entry, kept.get(entry["id"], ()), labels, masks) for entry in images]
    behind = [_picture(entry, crowds.get(entry["id"], ()), labels, masks) for entry in images]
    pictures = [replace(p, crowds=b) if b.boxes else p for p, b in zip(pictures, behind, strict=True)]
    empty = sum(not picture.boxes for picture in pictures)
    notes += [f"{empty} of {len(pictures)} images have no object"] * bool(empty)
    names = tuple(name for _, name in categories)
    return BoxData(place, folder, tuple(pictures), names, tuple(labels), masks, tuple(notes))


def _picture(entry: Entry, annotations: Sequence[Entry], labels: Mapping[int, int], masks: bool) -> Picture:
    return Picture(
        entry["id"],
        entry["file_name"],
        entry["width"],
        entry["height"],
        tuple(a["bbox"] for a in annotations),
        tuple(labels[a["category_id"]] for a in annotations),
        tuple(a["segmentation"] for a in annotations) if masks else (),
    )


def _inside(
    annotations: Sequence[Entry], sizes: Mapping[int, tuple[int, int]]
) -> tuple[dict[int, list[Entry]], list[str]]:
    """The annotations of each image with their boxes clipped, and notes on what became of the others."""
    kept: dict[int, list[Entry]] = defaultdict(list)
    clipped = dropped = 0
    for annotation in annotations:
        x, y, width, height = annotation["bbox"]
        whole = (x, y, x + width, y + height)
        box = _clipped(whole, *sizes[annotation["image_id"]])
        if box[2] <= box[0] or box[3] <= box[1]:
            dropped += 1
            continue
        clipped += any(abs(a - b) > 0.5 for a, b in zip(whole, box, strict=True))
        kept[annotation["image_id"]].append({**annotation, "bbox": box})
    counts = {
        "boxes of zero size inside their image are left out": dropped,
        "boxes reached outside their image and are clipped": clipped,
    }
    return kept, [f"{count} {what}" for what, count in counts.items() if count]


def _clipped(box: tuple[float, float, float, float], width: int, height: int) -> tuple[float, float, float, float]:
    """As float32 has it, which is what tensors hold."""
    x1, y1, x2, y2 = (float(np.float32(value)) for value in box)
    return max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2)


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Raise DataError for images that are not there."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}", hint="Give the folder that holds the images.")
    present = {entry.name for entry in os.scandir(folder)}  # one look instead of one for each image
    missing = [name for name in names if name not in present and not (folder / name).is_file()]
    if missing:
        summary = f"{len(missing)} of {len(names)} images are not in {folder}:"
        raise DataError(listed(summary, missing), hint="Give the folder that the file_names are relative to.")


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
