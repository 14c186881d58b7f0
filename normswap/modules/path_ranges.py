"""Many layer paths in one text: `layer3.{0..22}.bn1` stands for 23 layers, on a page and in a rule alike."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

from ..errors import OptionError

T = TypeVar("T")
ROOT = "(root)"
"""How the path of the network itself, which is empty, is written."""

_NUMBER = re.compile(r"(\d+)")
_PIECE = r"\d+(?:\.\.\d+(?:\.\.\d+)?)?"
_RANGE = re.compile(rf"\{{({_PIECE}(?:,{_PIECE})*)\}}")
_PLACE = "\ue000"  # stands for a range while shell wildcards are translated; neither they nor paths have it
_LARGEST = 99_999


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern covers a dotted path: shell wildcards over the whole of it, or a module and all below it.

    `{0..35}`, `{1..28..3}`, `{1,4}` and `{0..2,5}` stand for a whole number: of a range, of a range in equal steps, of
    a list, of a list of such. Tables write the paths of several layers so; `(root)` is the network itself.
    Raises OptionError for a range that holds no number, or numbers above 99999.
    """
    if path == pattern or path.startswith(pattern + ".") or fnmatch.fnmatchcase(path, pattern):
        return True
    if pattern == ROOT:
        return path == ""
    return _RANGE.search(pattern) is not None and any(each.match(path) for each in _ranged(pattern))


@functools.lru_cache(maxsize=256)
def _ranged(pattern: str) -> tuple[re.Pattern[str], ...]:
    """What a pattern with ranges stands for: with its other characters as they are, and with wildcards among them."""
    words = _RANGE.split(pattern)
    numbers = [rf"(?<!\d)0*(?:{'|'.join(map(str, _numbers(text)))})(?!\d)" for text in words[1::2]]
    plain = "".join(re.escape(word) + number for word, number in zip(words[::2], (*numbers, ""), strict=True))
    wild = fnmatch.translate(_PLACE.join(words[::2])).split(_PLACE)
    return (
        re.compile(rf"(?:{plain})(?:\..*)?\Z", re.DOTALL),
        re.compile("".join(part + number for part, number in zip(wild, (*numbers, ""), strict=True))),
    )


def _numbers(text: str) -> list[int]:
    """`0..2,5` as 0, 1, 2, 5."""
    found: set[int] = set()
    for piece in text.split(","):
        first, *rest = map(int, piece.split(".."))
        last, step = (*rest, 1)[:2] if rest else (first, 1)
        if not (first <= last <= _LARGEST and step):
            raise OptionError(
                f"{{{piece}}} is no range of numbers", hint="A range is {FIRST..LAST} or {FIRST..LAST..STEP}."
            )
        found.update(range(first, last + 1, step))
    return sorted(found)


@dataclass(frozen=True)
class PathRange(Generic[T]):
    """Items that differ in one number of their path. `name` is the path, with the numbers as a range."""

    name: str
    items: tuple[T, ...]


@dataclass(frozen=True)
class _Entry(Generic[T]):
    index: int
    item: T
    words: tuple[str, ...]
    numbers: tuple[str, ...]


def collapse(
    items: Iterable[T], path: Callable[[T], str], *keys: Callable[[T], Hashable], together: bool = True
) -> list[PathRange[T]]:
    """Put items together whose paths differ in one number and whose key is equal, in order of their first item.

    Of several keys, the first is tried on all items, the next on those that stayed alone, and so on; those further
    keys, being looser, join only neighbours and equal steps, not whatever happens to look alike.
    together=False gives each item a run of its own.
    """
    entries = [_entry(i, item, path(item)) for i, item in enumerate(items)]
    found: list[tuple[int, PathRange[T]]] = []
    for loose, key in enumerate(keys if together else ()):
        by_key: dict[Hashable, list[_Entry[T]]] = defaultdict(list)
        for entry in entries:
            by_key[key(entry.item), entry.words].append(entry)
        entries = []
        for alike in by_key.values():
            runs, alone = _runs(alike, even=loose > 0)
            found += runs
            entries += alone
        entries.sort(key=lambda entry: entry.index)
    found += [(e.index, PathRange(_joined(e.words, e.numbers), (e.item,))) for e in entries]
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def _entry(index: int, item: T, path: str) -> _Entry[T]:
    parts = _NUMBER.split(path)
    return _Entry(index, item, tuple(parts[0::2]), tuple(parts[1::2]))


def _runs(entries: list[_Entry[T]], *, even: bool) -> tuple[list[tuple[int, PathRange[T]]], list[_Entry[T]]]:
    """Runs along the number that leaves the fewest rows, then along the next best; and what stayed alone."""
    found: list[tuple[int, PathRange[T]]] = []
    open_places = list(range(len(entries[0].numbers)))
    while open_places and len(entries) > 1:
        groups = {place: _along(entries, place) for place in open_places}
        # Of equals, an index that is a path component of its own (`layer1.0.`) goes before a suffix (`bn1`).
        best = min(open_places, key=lambda p: (len(groups[p]), not _is_component(entries[0].words, p), p))
        open_places.remove(best)
        entries = []
        for group in groups[best]:
            if len(group) == 1 or (even and not _is_even([entry.numbers[best] for entry in group])):
                entries += group
                continue
            numbers = list(group[0].numbers)
            numbers[best] = spans([entry.numbers[best] for entry in group])
            name = _joined(group[0].words, numbers)
            found.append((group[0].index, PathRange(name, tuple(entry.item for entry in group))))
    return found, entries


def _is_even(numbers: Sequence[str]) -> bool:
    values = sorted({int(n) for n in numbers})
    steps = {b - a for a, b in pairwise(values)}
    return steps == {1} or (len(steps) == 1 and len(values) > 2)


def _along(entries: list[_Entry[T]], place: int) -> list[list[_Entry[T]]]:
    groups: dict[tuple[str, ...], list[_Entry[T]]] = defaultdict(list)
    for entry in entries:
        groups[entry.numbers[:place] + entry.numbers[place + 1 :]].append(entry)
    return list(groups.values())


def _is_component(words: Sequence[str], place: int) -> bool:
    before, after = words[place], words[place + 1]
    return (not before or before.endswith(".")) and (not after or after.startswith("."))


def _joined(words: Sequence[str], numbers: Sequence[str]) -> str:
    return "".join(word + number for word, number in zip(words, (*numbers, ""), strict=True))


def spans(numbers: Sequence[str]) -> str:
    """`{0..2}`, `{1..28..3}` for equal steps, `{0,2..5}`, in braces as `matches` reads them; all of them, always."""
    values = sorted({int(n) for n in numbers})
    pieces = []
    while values:
        step = values[1] - values[0] if len(values) > 1 else 1
        length = next((i for i, value in enumerate(values) if value != values[0] + i * step), len(values))
        if length < (3 if step == 1 else 4):
            length = 1
        pieces.append(_piece(values[0], values[length - 1], step))
        values = values[length:]
    return f"{{{','.join(pieces)}}}"


def _piece(first: int, last: int, step: int) -> str:
    return f"{first}" if first == last else f"{first}..{last}" if step == 1 else f"{first}..{last}..{step}"


def local_names(text: str, path: str) -> str:
    """Paths of neighbours as the layer's own module calls them, so that equal reasons read the same in each block."""
    parent = path.rpartition(".")[0]
    return text.replace(f"{parent}.", "") if parent else text
