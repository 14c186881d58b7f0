"""A folder of images with boxes -> the format that they are in, a training part and a validation part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...data.box_data import BoxData
from ...data.coco import open_coco
from ...data.voc import find_voc
from ...data.yolo import find_yolo
from ...errors import DataError
from .splits import TRAIN, VALIDATION, part_of

ANNOTATIONS = ("annotations.json", "_annotations.coco.json")
_LAYOUT = (
    "Give a folder with annotations.json and images/, one with train/ and val/ of such, COCO's own "
    "(annotations/instances_train2017.json and train2017/), one with YOLO's data.yaml, or Pascal VOC's (Annotations/, "
    "JPEGImages/)."
)
_TRAIN = (*TRAIN, "trainval")


class BoxFolder(Protocol):
    """A data set that was found in a folder. parts: what it has, by name; `""` for one that has no parts."""

    @property
    def parts(self) -> Mapping[str, object]:
        """By name."""

    def open(self, part: str, *, masks: bool = False) -> BoxData:
        """Raises DataError."""


@dataclass(frozen=True)
class _Coco:
    """parts: an annotation file and the folder of its images each."""

    parts: Mapping[str, tuple[Path, Path]]

    def open(self, part: str, *, masks: bool = False) -> BoxData:
        return open_coco(*self.parts[part], masks=masks)

    def __str__(self) -> str:
        return f"COCO ({next(iter(self.parts.values()))[0].name})"


def opened(place: Path, masks: bool, *, training: bool = True) -> tuple[BoxData, BoxData | None]:
    """The training data in a folder or a YAML file, and the validation data where there is some. Raises DataError.

    training: whether there has to be a part to train on.
    """
    found = found_in(place)
    train = next((part for part in (*_TRAIN, "") if part in found.parts), None)
    validation = next((part for part in VALIDATION if part in found.parts), None)
    if train is None:
        if training:
            raise DataError(f"{place} has no part to train on, but {' and '.join(found.parts)}", hint=_LAYOUT)
        return single(place, masks), None
    return found.open(train, masks=masks), None if validation is None else found.open(validation, masks=masks)


def single(place: Path, masks: bool) -> BoxData:
    """One set: all of what has no parts, else the validation part. Raises DataError."""
    found = found_in(place)
    names = (*VALIDATION, *_TRAIN, *found.parts)
    return found.open(next(part for part in names if part in found.parts), masks=masks)


def found_in(place: Path) -> BoxFolder:
    """The data set with boxes that lies there. Raises DataError for none, or several."""
    if not place.exists():
        raise DataError(f"{place} is not there", hint=_LAYOUT)
    every = (_find_coco(place), find_yolo(place), find_voc(place))
    found: list[BoxFolder] = [each for each in every if each is not None]
    if len(found) > 1:
        raise DataError(
            f"{place} holds boxes in {len(found)} formats, {' and '.join(map(str, found))}",
            hint="Keep one of them there. A file can be named as well: COCO's as the annotations, YOLO's YAML as the "
            "data.",
        )
    if not found:
        lacks = f"holds no {' or '.join(ANNOTATIONS)}, nor boxes in the format of YOLO or Pascal VOC"
        raise DataError(f"{place} {lacks if place.is_dir() else 'is a file, not a folder'}", hint=_LAYOUT)
    return found[0]


def _find_coco(folder: Path) -> _Coco | None:
    first, second = part_of(folder, TRAIN), part_of(folder, VALIDATION)
    if first is not None and (train := _files_in(first)):
        return _Coco({"train": train} | ({} if second is None else {"val": _required(second)}))
    original = {part: _of_coco(folder, names) for part, names in (("train", TRAIN), ("val", VALIDATION))}
    if original["train"] is not None:
        return _Coco({part: place for part, place in original.items() if place is not None})
    place = _files_in(folder)
    return None if place is None else _Coco({"": place})


def _required(folder: Path) -> tuple[Path, Path]:
    place = _files_in(folder)
    if place is None:
        raise DataError(f"{folder} holds no {' or '.join(ANNOTATIONS)}", hint=_LAYOUT)
    return place


def _files_in(folder: Path) -> tuple[Path, Path] | None:
    """An annotation file and the folder of its images."""
    file = next((folder / name for name in ANNOTATIONS if (folder / name).is_file()), None)
    if file is None:
        return None
    return file, folder / "images" if (folder / "images").is_dir() else folder


def _of_coco(folder: Path, names: Sequence[str]) -> tuple[Path, Path] | None:
    """`annotations/instances_train2017.json` and `train2017/`, as COCO comes."""
    files = [f for name in names for f in sorted((folder / "annotations").glob(f"instances_{name}*.json"))]
    places = [(file, folder / file.stem.removeprefix("instances_")) for file in files]
    return next(((file, images) for file, images in places if images.is_dir()), None)
