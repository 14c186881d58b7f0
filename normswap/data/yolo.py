"""Detection data in YOLO's format: a YAML file that names classes and parts, images, a text file of boxes for each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DataError, listed, plural
from .box_data import BoxData, Entry, gathered
from .coco_masks import pycocotools_mask
from .image_files import EXTENSIONS
from .yolo_labels import labels_of
from .yolo_yaml import data_file, is_yaml, names_in, places_in

IMAGES, LABELS, CLASSES = "images", "labels", "classes.txt"
_SEE = (
    "The format is described at https://docs.ultralytics.com/datasets/detect: data.yaml with names, train and val, and "
    "for images/NAME.jpg labels/NAME.txt with lines CLASS X Y WIDTH HEIGHT."
)
_NO_FILE = "images have no label file and count as without objects"
_IS_TURNED = "images are turned by EXIF, which is not applied: their boxes have to be of the pixels as they are stored"
_TURNED = range(2, 9)  # values of EXIF's orientation that turn or mirror the picture
_ORIENTATION = 274


@dataclass(frozen=True)
class YoloFolder:
    """A data set that was found: what names its classes, and the folders or lists of the images of each part.

    parts: by the name of the part, `train`, `val` or `test`; `""` for one that has no parts.
    """

    place: Path
    names: tuple[str, ...]
    parts: Mapping[str, tuple[Path, ...]]

    def open(self, part: str, *, masks: bool = False) -> BoxData:
        """See `open_yolo`."""
        if masks:
            pycocotools_mask()  # its error, if it is missing, comes before the first image is read
        return _read(self, part, masks)

    def __str__(self) -> str:
        return f"YOLO ({self.place.name})"


def open_yolo(place: str | os.PathLike[str], part: str = "train", *, masks: bool = False) -> BoxData:
    """Read a data set in YOLO's format. Of the images only the sizes are read yet.

    place: a YAML file, with `names` and the folders or lists of images of its parts, or a folder with one, or one with
    images/, labels/ and classes.txt, which has no parts. Class 0 becomes label 1. A line of a label file is a class and
    the centre, width and height of a box as shares of the image, or a class and the points of a polygon; then the box
    is around it, and with masks it is the mask. Boxes are clipped to the image, those of zero size left out; an image
    without a label file, or with an empty one, has no objects. `notes` says how many there are of each.

    Raises DataError, naming file and line of up to 10 offenders, for lines that are no object, classes that are not
    named, label files without an image, lists of images that are not there, and a part that is not there; and
    NormswapError for YAML without PyYAML, or masks without pycocotools.
    """
    found = find_yolo(Path(place))
    if found is None:
        raise DataError(f"{place} holds no boxes in YOLO's format", hint=_SEE)
    if part not in found.parts and [*found.parts] != [""]:
        parts = " and ".join(found.parts)
        raise DataError(f"{found.place} has no part {part!r}, but {parts or 'none at all'}", hint=_SEE)
    return found.open(part if part in found.parts else "", masks=masks)


def find_yolo(place: Path) -> YoloFolder | None:
    """What of YOLO's lies in a folder, or is named by a YAML file; None for nothing. Raises DataError where broken."""
    if place.is_file() and is_yaml(place):
        return YoloFolder(place, names_in(place), places_in(place))
    if not place.is_dir():
        return None
    file = data_file(place)
    if file is not None and (parts := places_in(file, required=not _pairs(place))):
        return YoloFolder(file, names_in(file), parts)
    parts = _pairs(place)
    if not parts:
        return None
    for folder in (place, place / LABELS, place.parent):  # of Roboflow's train/, the file that names is beside it
        file = data_file(folder)
        if file is not None:
            return YoloFolder(file, names_in(file), parts)
        if (folder / CLASSES).is_file() and (names := (folder / CLASSES).read_text("utf-8-sig").split("\n")) != [""]:
            return YoloFolder(folder / CLASSES, tuple(name.strip() for name in names if name.strip()), parts)
    raise DataError(f"{place / LABELS} holds labels, but nothing names their classes", hint=_SEE)


def _pairs(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Images and labels in folders of these names, without a file that says where they are."""
    images, labels = folder / IMAGES, folder / LABELS
    if not images.is_dir() or not labels.is_dir() or next(labels.rglob("*.txt"), None) is None:
        return {}
    parts: dict[str, tuple[Path, ...]] = {
        each.name: (each,) for each in sorted(images.iterdir()) if (labels / each.name).is_dir()
    }
    return parts or {"": (images,)}


# --- images -------------------------------------------------------------------------------------------------------


def _read(found: YoloFolder, part: str, masks: bool) -> BoxData:
    sources, problems = found.parts[part], list[str]()
    files = [file for source in sources for file in _images_of(source, found.place.parent, problems)]
    if not files and not problems:
        raise DataError(f"there is no image in {', '.join(map(str, sources))}", hint=_SEE)
    texts = [label_file(file) for file in files]
    problems += _without_image(sources, set(texts))
    without = sum(not text.is_file() for text in texts)
    if files and without == len(files):
        raise DataError(f"none of {plural(without, 'image')} has labels; those of {files[0]} would be {texts[0]}",
                        hint=_SEE)  # fmt: skip
    sizes = _sizes(files)
    annotations: list[Entry] = []
    for number, (text, (size, _)) in enumerate(zip(texts, sizes, strict=True), start=1):
        objects, wrong = labels_of(text, len(found.names), size, polygons=masks) if text.is_file() else ([], [])
        annotations += [{"image_id": number, **each} for each in objects]
        problems += wrong
    if problems:
        raise DataError(listed(f"{found.place}: {len(problems)} labels are unusable:", problems), hint=_SEE)
    folder = _common(files)
    images = [
        {"id": number, "file_name": os.path.relpath(file, folder), "width": width, "height": height}
        for number, (file, ((width, height), _)) in enumerate(zip(files, sizes, strict=True), start=1)
    ]
    data = gathered(_common(texts), folder, images, annotations, [*enumerate(found.names)], masks=masks)
    counts = {_NO_FILE: without, _IS_TURNED: sum(turned for _, turned in sizes)}
    return replace(data, notes=(*(f"{count} {what}" for what, count in counts.items() if count), *data.notes))


def _common(files: Sequence[Path]) -> Path:
    """The folder that all are below."""
    return Path(os.path.commonpath([file.parent for file in files]))


def _images_of(source: Path, root: Path, problems: list[str]) -> list[Path]:
    """The images of a folder, or of a list with one path a line. Adds to the problems lines that lead nowhere."""
    if source.is_dir():
        return sorted(file for file in source.rglob("*") if file.suffix.lower() in EXTENSIONS)
    found = []
    for number, line in enumerate(source.read_text("utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        tried = [folder / line.strip() for folder in (source.parent, root)]
        file = next((place for place in tried if place.is_file()), None)
        if file is None:
            problems.append(f"{source}, line {number}: there is no image {tried[0]}")
        else:
            found.append(file)
    return found


def label_file(image: Path) -> Path:
    """The last folder `images` of the path is `labels`; beside the image where there is no such folder."""
    parts = list(image.with_suffix(".txt").parts)
    places = [i for i, part in enumerate(parts) if part == IMAGES]
    if places:
        parts[places[-1]] = LABELS
    return Path(*parts)


def _without_image(sources: tuple[Path, ...], known: set[Path]) -> list[str]:
    found = []
    for source in sources:
        folder = label_file(source / "x").parent
        if source.is_dir() and folder != source:
            lost = (file for file in sorted(folder.rglob("*.txt")) if file not in known and file.name != CLASSES)
            found += [f"{file}: there is no image for it in {source}" for file in lost]
    return found


def _sizes(files: list[Path]) -> list[tuple[tuple[int, int], bool]]:
    """Width and height of each, and whether EXIF turns it; (1, 1) for what cannot be read: that is told later."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_size, files))


def _size(file: Path) -> tuple[tuple[int, int], bool]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.size, image.getexif().get(_ORIENTATION) in _TURNED
    except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        return (1, 1), False
