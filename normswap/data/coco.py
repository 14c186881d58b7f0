"""Detection data in the COCO format: an annotation file and a folder of images -> images and targets."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError, listed, plural
from .coco_annotations import check_files, check_links, kept_of, tables_of
from .coco_masks import mask_of, pycocotools_mask
from .decoding import Unreadable, decode
from .preprocess import Preprocess

_LOOK_AHEAD = 2000  # how many images more are tried once one is unreadable, so as to report them together


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


def open_coco(annotations: str | os.PathLike[str], folder: str | os.PathLike[str], *, masks: bool = False) -> CocoData:
    """Read a COCO annotation file; `folder` is where its `file_name`s begin. Reads no image yet.

    Category ids, which may have gaps, become labels 1, 2, ... in rising order (0 is the background of torchvision's
    detectors). Boxes are clipped to the image; boxes of zero size and crowds are left out; `notes` says how many.
    Images without objects stay. masks: targets get masks, from polygons or run lengths, compressed or not.

    Raises DataError, naming the file and up to 10 offenders, for what is not JSON or not COCO, ids that are given
    twice or refer to nothing, boxes that are not four numbers, missing segmentations, and missing image files; and
    NormswapError for masks without pycocotools.
    """
    if masks:
        pycocotools_mask()  # its error, if it is missing, comes before the first image is read
    file, folder = Path(annotations), Path(folder)
    tables = tables_of(file)
    images = {entry["id"]: entry for entry in tables["images"]}
    categories = sorted((entry["id"], str(entry["name"])) for entry in tables["categories"])
    labels = {category: label for label, (category, _) in enumerate(categories, start=1)}
    check_links(file, tables["annotations"], images, labels)
    single = [a for a in tables["annotations"] if not a.get("iscrowd")]
    crowded = [a for a in tables["annotations"] if a.get("iscrowd")]
    kept, notes = kept_of(file, single, images, masks)
    crowds, _ = kept_of(file, crowded, images, masks)
    notes += [f"{len(crowded)} crowds are left out of training"] * bool(crowded)
    check_files(folder, [entry["file_name"] for entry in tables["images"]])
    pictures = tuple(_picture(entry, kept[entry["id"]], labels, masks) for entry in tables["images"])
    pictures = tuple(
        replace(p, crowds=_picture(entry, crowds[p.id], labels, masks)) if crowds[p.id] else p
        for p, entry in zip(pictures, tables["images"], strict=True)
    )
    empty = sum(not picture.boxes for picture in pictures)
    notes += [f"{empty} of {len(pictures)} images have no object"] * bool(empty)
    ids, names = tuple(i for i, _ in categories), tuple(name for _, name in categories)
    return CocoData(file, folder, pictures, names, ids, masks, tuple(notes))


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
