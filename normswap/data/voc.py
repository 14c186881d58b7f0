"""Detection data in the format of Pascal VOC: an XML file of boxes for each image, and lists of the parts."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..errors import DataError, listed
from .box_data import BoxData, Entry, gathered
from .image_files import EXTENSIONS
from .voc_xml import Described, Labelled, read_xml

ANNOTATIONS, IMAGES, LISTS = "Annotations", "JPEGImages", Path("ImageSets", "Main")
_PARTS = ("train", "trainval", "val", "valid", "validation", "test")
_SEE = (
    "The format is described at http://host.robots.ox.ac.uk/pascal/VOC: Annotations/NAME.xml, JPEGImages/NAME.jpg and "
    "ImageSets/Main/train.txt and val.txt with a NAME a line."
)


@dataclass(frozen=True)
class VocFolder:
    """A data set that was found. parts: the XML files of each, by its name; `""` for one that has no parts."""

    place: Path
    images: Mapping[str, Path]
    parts: Mapping[str, tuple[Path, ...]]

    def open(self, part: str, *, masks: bool = False) -> BoxData:
        """See `open_voc`."""
        if masks:
            raise DataError(
                f"{self.place} holds boxes, as all of Pascal VOC's XML files, but the network predicts masks",
                hint="Give masks in COCO's or YOLO's format, or take a network without them.",
            )
        return _read(self, part)

    @cached_property
    def described(self) -> dict[Path, Described]:
        """What the files of all parts say. Raises DataError where that cannot be used."""
        found = {file: read_xml(file) for files in self.parts.values() for file in files}
        problems = [problem for each in found.values() for problem in each.problems]
        if problems:
            raise DataError(listed(f"{self.place}: {len(problems)} annotations are unusable:", problems), hint=_SEE)
        return found

    @property
    def begins(self) -> int:
        """The number of the first pixel: 1, or 0 where a box says so."""
        return 0 if any(min(o.box[:2]) < 1 for each in self.described.values() for o in each.objects) else 1

    def __str__(self) -> str:
        return f"Pascal VOC ({self.place.name}/*.xml)"


def open_voc(folder: str | os.PathLike[str], part: str = "train") -> BoxData:
    """Read a data set in the format of Pascal VOC. Reads no image yet, unless an XML file does not say its size.

    folder: Annotations/, JPEGImages/ and, where it has parts, ImageSets/Main/ with a list of each; or a folder of
    images with an XML file beside each, or train/ and val/ folders of such. The names of all objects of all parts
    become labels 1, 2, ... in the order of the alphabet. Pixels count from 1, and a box includes its last, so that one
    from 1 to the image's width is as wide as the image; where a box begins at 0, all are taken to count from 0. Boxes
    are clipped to the image; boxes of zero size and difficult objects are left out; `notes` says how many.

    Raises DataError, naming file and line of up to 10 offenders, for what is not XML, objects without name or box,
    parts that list what is not there, and images that are missing.
    """
    found = find_voc(Path(folder))
    if found is None:
        raise DataError(f"{folder} holds no boxes in the format of Pascal VOC", hint=_SEE)
    if part not in found.parts and [*found.parts] != [""]:
        raise DataError(f"{folder} has no part {part!r}, but {' and '.join(found.parts)}", hint=_SEE)
    return found.open(part if part in found.parts else "")


def find_voc(folder: Path) -> VocFolder | None:
    """What of Pascal VOC's lies in a folder; None for nothing. Raises DataError where it is broken."""
    if not folder.is_dir():
        return None
    for place in (folder / ANNOTATIONS, folder / ANNOTATIONS.lower(), folder):
        files = tuple(sorted(place.glob("*.xml"))) if place.is_dir() else ()
        if files:
            images = next((folder / name for name in (IMAGES, "images") if (folder / name).is_dir()), folder)
            return VocFolder(place, _images_in(images), _listed(folder / LISTS, place) or {"": files})
    parts = {part: tuple(sorted((folder / part).glob("*.xml"))) for part in _PARTS}
    parts = {part: files for part, files in parts.items() if files}
    if parts:
        return VocFolder(folder, _images_in(*(folder / part for part in parts)), parts)
    inner = [each for each in sorted(folder.glob("VOC*")) if (each / ANNOTATIONS).is_dir() or each.name == "VOCdevkit"]
    if len(inner) > 1:
        names = " and ".join(each.name for each in inner)
        raise DataError(f"{folder} holds {len(inner)} data sets, {names}", hint=f"Name one: {inner[0]}")
    return find_voc(inner[0]) if inner else None


def _images_in(*folders: Path) -> dict[str, Path]:
    """By the name without its end, below which folder it lies included."""
    files = (file for folder in folders for file in sorted(folder.iterdir()))
    return {str(file.with_suffix("")): file for file in files if file.suffix.lower() in EXTENSIONS}


def _listed(lists: Path, annotations: Path) -> dict[str, tuple[Path, ...]]:
    found, problems = {}, []
    for part in _PARTS:
        file = lists / f"{part}.txt"
        if not file.is_file():
            continue
        names = [line.split()[0] if line.strip() else "" for line in file.read_text("utf-8-sig").splitlines()]
        places = {number: annotations / f"{name}.xml" for number, name in enumerate(names, start=1) if name}
        gone = {number: place for number, place in places.items() if not place.is_file()}
        problems += [f"{file}, line {number}: there is no {place}" for number, place in gone.items()]
        found[part] = tuple(places.values())
    if problems:
        raise DataError(listed(f"{lists}: {len(problems)} images have no annotations:", problems), hint=_SEE)
    return {part: files for part, files in found.items() if files}


def _read(found: VocFolder, part: str) -> BoxData:
    places = _places(found, part)
    folder = Path(os.path.commonpath([place.parent for place in places.values()]))
    categories = sorted({o.name for each in found.described.values() for o in each.objects})
    images: list[Entry] = []
    annotations: list[Entry] = []
    for number, (file, place) in enumerate(places.items(), start=1):
        width, height = found.described[file].size or _size(place)
        images.append({"id": number, "file_name": os.path.relpath(place, folder), "width": width, "height": height})
        for each in found.described[file].objects:
            box, category = _box(each, found.begins), categories.index(each.name)
            annotations.append({"image_id": number, "category_id": category, "bbox": box, "iscrowd": each.difficult})
    data = gathered(found.place, folder, images, annotations, [*enumerate(categories)], left_out="difficult objects")
    note = ["a box begins at 0, so pixels are taken to count from 0, not from 1"] * (not found.begins)
    return replace(data, notes=(*note, *data.notes))


def _box(found: Labelled, begins: int) -> list[float]:
    """x, y, width, height. Counted from 1, the last pixel is part of the box; from 0, its edge is."""
    x1, y1, x2, y2 = found.box
    return [x1 - begins, y1 - begins, x2 - x1 + begins, y2 - y1 + begins]


def _places(found: VocFolder, part: str) -> dict[Path, Path]:
    """The image of each XML file."""
    folders = {place.parent for place in found.images.values()}
    places, gone = {}, []
    for file in found.parts[part]:
        name = found.described[file].name
        image = _image_of(file, name, folders, found.images)
        if image is None:
            gone.append(f"{file}: there is no image {name or file.stem}")
        else:
            places[file] = image
    if gone:
        raise DataError(listed(f"{len(gone)} of {len(found.parts[part])} images are missing:", gone), hint=_SEE)
    return places


def _image_of(file: Path, name: str, folders: Collection[Path], images: Mapping[str, Path]) -> Path | None:
    """The image of the XML file's own name, else that which it names."""
    beside = [file.parent] if file.parent in folders else [*folders]
    keys = (str(folder / stem) for stem in (file.stem, Path(name).stem) for folder in beside)
    return next((images[key] for key in keys if key in images), None)


def _size(image: Path) -> tuple[int, int]:
    """(1, 1) for what is told as unreadable when its turn comes."""
    from .decoding import Unreadable, decode

    try:
        return decode(image).size
    except Unreadable:
        return 1, 1
