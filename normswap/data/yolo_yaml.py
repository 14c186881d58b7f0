"""YOLO's data.yaml: what the classes are called, and where the images of each part are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import DataError, NormswapError, first_line

PARTS = ("train", "val", "valid", "test")
_USUAL = ("data", "dataset")
_EXAMPLE = "For example: names: [cat, dog], train: images/train, val: images/val."


def is_yaml(file: Path) -> bool:
    """By its name."""
    return file.suffix.lower() in (".yaml", ".yml")


def data_file(folder: Path) -> Path | None:
    """The YAML file in a folder that describes data. Raises DataError where there are several."""
    found = [file for file in sorted(folder.iterdir()) if is_yaml(file) and file.is_file() and _describes(file)]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise DataError(f"{folder} holds {len(found)} files that describe data, {names}", hint=f"Name one: {found[0]}")
    return found[0] if found else None


def _describes(file: Path) -> bool:
    """Files of other programs are not looked at closely, but one that is called as YOLO's has to be right."""
    if file.stem in _USUAL:
        return True
    try:
        content = _content(file)
    except DataError:
        return False
    return "names" in content and any(part in content for part in PARTS)


def names_in(file: Path) -> tuple[str, ...]:
    """Of class 0, 1, .... Raises DataError."""
    content = _content(file)
    names, count = content.get("names"), content.get("nc")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(f"{file}: names has the numbers {_told([*names])}, not 0 to {len(names) - 1}")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{file} has no list of names", hint=_EXAMPLE)
    if count is not None and count != len(names):
        raise DataError(f"{file}: nc is {count}, but there are {len(names)} names", hint="Let the two agree.")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{file} names two classes {twice[0]!r}", hint="Give each class a name of its own.")
    return tuple(map(str, names))


def places_in(file: Path, *, required: bool = True) -> dict[str, tuple[Path, ...]]:
    """The folders, or the lists, of the images of each part. Raises DataError for those that are not there.

    required: raise DataError, too, where the file names no part.
    """
    content = _content(file)
    found = {part: content[part] for part in PARTS if content.get(part)}
    if not found and required:
        raise DataError(f"{file} does not say where the images are: it has no train, val or test", hint=_EXAMPLE)
    return {part: tuple(_place(file, content.get("path"), part, each) for each in _each(file, part, value))
            for part, value in found.items()}  # fmt: skip


def _each(file: Path, part: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in values):
        raise DataError(f"{file}: {part} is {_told(value)}, not a path or a list of paths", hint=_EXAMPLE)
    return values


def _place(file: Path, root: Any, part: str, text: str) -> Path:
    """Of all that the path may be relative to, the first that is there."""
    roots = [file.parent / str(root), file.parent.parent / str(root)] if root else []
    tried = [start / text for start in (*roots, file.parent)]
    if text.startswith("../"):  # as Roboflow writes it, which means the folder of the file itself
        tried.append(file.parent / text.removeprefix("../"))
    found = next((place for place in tried if place.exists()), None)
    if found is None:
        raise DataError(
            f"{file}: {part} is {text}, and there is neither a folder nor a list {tried[0]}",
            hint="Paths are relative to path, or to the file where it has none.",
        )
    return found


def _content(file: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise NormswapError(
            f"{file} needs PyYAML, which is not installed", hint="pip install 'normswap[train]'"
        ) from error
    try:
        found = yaml.safe_load(file.read_text("utf-8-sig"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise DataError(
            f"{file}{line}: {getattr(error, 'problem', None) or first_line(error)}", hint=_EXAMPLE
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} holds {_told(found)}, not names and paths", hint=_EXAMPLE)
    return found


def _told(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
