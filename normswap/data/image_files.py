"""Which image files a folder holds: in itself, and below each of its subfolders."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from ..errors import DataError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SPLITS = frozenset("train training val valid validation dev test testing eval".split())
_NAMED = 10


def files_in(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """The images in the folder itself, and those anywhere below each of its subfolders.

    Links that lead nowhere count by their names, as unreadable images do.
    """
    if not folder.exists():
        raise DataError(f"there is no folder {folder}", hint="Give a folder of images or of class folders.")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file, not a folder", hint=f"Give the folder that holds it: {folder.parent}")
    try:
        entries = sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
    lost = {e.name for e in entries if e.is_symlink() and not os.path.exists(e.path)}  # gone, or a loop: is_dir raises
    here = [Path(e.path) for e in entries if _is_image(e.name) and (e.name in lost or e.is_file())]
    classes = [e for e in entries if e.name not in lost and e.is_dir()]
    seen = {identity(folder)}
    real = {identity(e.path) for e in classes} - seen  # walked in their own turn, whatever links lead to them
    below: dict[str, list[Path]] = {}
    for entry in classes:
        if (own := identity(entry.path)) in seen:
            _refuse_twice(folder, entry.name, below)
            continue  # a link to the folder itself
        below[entry.name] = _images_below(Path(entry.path), seen | real - {own})
        seen |= {own}
    return here, below


def boxed_images(folder: Path, below: dict[str, list[Path]]) -> list[Path]:
    """The images of a folder that describes their boxes beside them, so that its subfolders are no classes."""
    beside = {"JPEGImages": ("Annotations",), "images": ("labels", "Annotations", "annotations")}
    for images, others in beside.items():
        described = any(other in below and not below[other] for other in others) or any(
            (folder / name).is_file() for name in ("annotations.json", "_annotations.coco.json")
        )
        if described and below.get(images):
            return below[images]
    return []


def _refuse_twice(folder: Path, name: str, below: dict[str, list[Path]]) -> None:
    for other in below:
        if os.path.samefile(folder / other, folder / name):
            raise DataError(
                f"{folder} holds {other!r} and {name!r}, which are one and the same folder",
                hint="One of them is a link; each class needs images of its own.",
            )


def identity(path: str | os.PathLike[str]) -> object:
    """What is the same for two paths if they lead to one file or folder, through links of either kind."""
    try:
        found = os.stat(path)
    except OSError:  # a link that leads nowhere: told when it is read
        return os.fspath(path)
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)  # 0: a file system without numbers


def _images_below(top: Path, seen: Set[object]) -> list[Path]:
    """The images anywhere below a folder. Each real folder is visited once, by its own path if that is below `top`.

    seen: folders that are left out.
    """
    found: dict[str, list[str]] = {}
    visited, links = set(seen), [str(top)]
    while links:
        later: list[str] = []
        for place in links:
            for root, folders, names in os.walk(place):
                if (own := identity(root)) in visited:
                    folders.clear()
                    continue
                visited.add(own)
                found[root] = names
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                later += [path for path in (os.path.join(root, name) for name in folders) if os.path.islink(path)]
        links = later
    return [Path(root, name) for root in sorted(found) for name in sorted(found[root]) if _is_image(name)]


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def check_usable(folder: Path, here: list[Path], below: dict[str, list[Path]], filled: dict[str, list[Path]]) -> None:
    """Raise DataError for images neither alone nor by class. filled: what of `below` holds any."""
    splits = [name for name in filled if name.lower() in _SPLITS]
    if splits and (len(splits) == len(filled) or any(_holds_classes(folder / s, filled[s]) for s in splits)):
        raise DataError(
            f"{folder} holds {_quoted(splits)}, which are parts of a data set, not classes",
            hint="Give one of them: " + " or ".join(str(folder / name) for name in splits),
        )
    if here and filled:
        raise DataError(
            f"{folder} holds both images ({len(here)}) and folders of images ({_quoted(filled)})",
            hint="Keep either images alone or one subfolder for each class, and move the rest out.",
        )
    if not here and not filled:
        raise DataError(f"there is no image in {folder}", hint=f"Known are {' '.join(EXTENSIONS)}")
    if filled and len(filled) < len(below):
        raise DataError(
            f"{folder} holds class folders without any image: {_quoted([n for n in below if n not in filled])}",
            hint="Their place decides the numbers of the other classes; fill them, or move out what is no class.",
        )


def _holds_classes(folder: Path, files: list[Path]) -> bool:
    return all(file.parent != folder for file in files) and len({f.relative_to(folder).parts[0] for f in files}) > 1


def _quoted(names: Sequence[str] | dict[str, Any]) -> str:
    names = list(names)
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(repr(name) for name in names[:_NAMED]) + rest
