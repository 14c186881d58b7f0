"""One XML file of Pascal VOC: an image's size, and the name and box of each object, with the line it begins in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_LINE = "line in the file"  # no attribute can have this name


@dataclass(frozen=True)
class Described:
    """What a file says. name: of the image, "" where it has none. size: None where it is not said."""

    name: str = ""
    size: tuple[int, int] | None = None
    objects: tuple[Labelled, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Labelled:
    """One object. box: xmin, ymin, xmax, ymax as the file has them."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


def read_xml(file: Path) -> Described:
    """What is wrong with it is among its `problems`, each with file and line."""
    try:
        root = _tree(file)
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        return Described(problems=(f"{file}, line {error.lineno}: it is not XML ({reason})",))
    except OSError as error:
        return Described(problems=(f"{file}: it cannot be read: {error.strerror or error}",))
    if root.tag != "annotation":
        return Described(problems=(f"{file}, line {root.get(_LINE)}: it begins with <{root.tag}>, not <annotation>",))
    objects, problems = [], []
    for element in root.findall("object"):
        try:
            objects.append(_labelled(element))
        except ValueError as error:
            problems.append(f"{file}, line {element.get(_LINE)}: {error}")
    name = (root.findtext("filename") or "").strip()
    return Described(name, _size(root), tuple(objects), tuple(problems))


def _tree(file: Path) -> Element:
    """As ElementTree makes it, with the line of each element."""
    builder, parser = TreeBuilder(), expat.ParserCreate()

    def start(tag: str, attributes: dict[str, str]) -> None:
        builder.start(tag, {**attributes, _LINE: str(parser.CurrentLineNumber)})

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(file.read_bytes(), True)
    return builder.close()


def _size(root: Element) -> tuple[int, int] | None:
    """None, too, for a size of 0, as some programs write it."""
    width, height = (_number(root.findtext(f"size/{side}")) for side in ("width", "height"))
    return (int(width), int(height)) if width >= 1 and height >= 1 else None


def _labelled(element: Element) -> Labelled:
    """Raises ValueError that says what is wrong."""
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object has no name")
    texts = [element.findtext(f"bndbox/{corner}") for corner in _CORNERS]
    for corner, text in zip(_CORNERS, texts, strict=True):
        if math.isnan(_number(text)):
            told = "no" if text is None or not text.strip() else f"{text.strip()[:40]!r} as"
            raise ValueError(f"{name!r} has {told} {corner}")
    x1, y1, x2, y2 = map(_number, texts)
    if x2 < x1 or y2 < y1:
        raise ValueError(f"{name!r} ends at {x2:g}, {y2:g}, before it begins at {x1:g}, {y1:g}")
    return Labelled(name, (x1, y1, x2, y2), (element.findtext("difficult") or "").strip() == "1")


def _number(text: str | None) -> float:
    """NaN for what is none."""
    try:
        found = float(text or "")
    except ValueError:
        return math.nan
    return found if abs(found) < 1e7 else math.nan
