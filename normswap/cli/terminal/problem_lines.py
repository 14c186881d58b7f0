"""Two hundred layer paths on a page: runs such as `layer3.[0-22].bn1` in place of 23 rows."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

T = TypeVar("T")
_NUMBER = re.compile(r"(\d+)")
_PIECES = 4


@dataclass(frozen=True)
class Run(Generic[T]):
    """Items that differ in one number of their path. `name` is the path, with the numbers in brackets."""

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
) -> list[Run[T]]:
    """Put items together whose paths differ in one number and whose key is equal, in order of their first item.

    Of several keys, the first is tried on all items, the next on those that stayed alone, and so on; those further
    keys, being looser, join only neighbours and equal steps, not whatever happens to look alike.
    together=False gives each item a run of its own.
    """
    entries = [_entry(i, item, path(item)) for i, item in enumerate(items)]
    found: list[tuple[int, Run[T]]] = []
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
    found += [(e.index, Run(_joined(e.words, e.numbers), (e.item,))) for e in entries]
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def _entry(index: int, item: T, path: str) -> _Entry[T]:
    parts = _NUMBER.split(path)
    return _Entry(index, item, tuple(parts[0::2]), tuple(parts[1::2]))


def _runs(entries: list[_Entry[T]], *, even: bool) -> tuple[list[tuple[int, Run[T]]], list[_Entry[T]]]:
    """Runs along the number that leaves the fewest rows, then along the next best; and what stayed alone."""
    found: list[tuple[int, Run[T]]] = []
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
            numbers[best] = f"[{spans([entry.numbers[best] for entry in group])}]"
            name = _joined(group[0].words, numbers)
            found.append((group[0].index, Run(name, tuple(entry.item for entry in group))))
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
    """`0-2`, `1,4..28` for equal steps, `0,2-5`; long irregular lists keep their ends."""
    values = sorted({int(n) for n in numbers})
    steps = {b - a for a, b in pairwise(values)}
    if len(values) > 2 and len(steps) == 1 and steps != {1}:
        return f"{values[0]},{values[1]}..{values[-1]}"
    pieces: list[list[int]] = []
    for value in values:
        if pieces and value == pieces[-1][-1] + 1:
            pieces[-1].append(value)
        else:
            pieces.append([value])
    texts = [str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in pieces]
    return ",".join(texts if len(texts) <= _PIECES else [*texts[: _PIECES - 2], "…", texts[-1]])


def problem_lines(problems: Iterable[str]) -> list[str]:
    """`PATH (CLASS): REASON` texts, those of layers that differ in a number of their path in one line.

    Where the numbers in their reasons differ as well, those of the reason's first part become ranges.
    """
    lines = []
    for run in collapse(map(_problem, problems), lambda p: p.path, lambda p: (p.kind, p.reason), _Problem.skeleton):
        first = run.items[0]
        reasons = {item.reason for item in run.items}
        reason = first.reason if len(reasons) == 1 else _ranged([r.partition(";")[0] for r in reasons])
        lines.append(f"{run.name}{first.kind}{reason}")
    return lines


@dataclass(frozen=True)
class _Problem:
    path: str
    kind: str
    reason: str

    def skeleton(self) -> tuple[str, str]:
        return self.kind, _NUMBER.sub("#", self.reason.partition(";")[0])


def _problem(text: str) -> _Problem:
    found = re.match(r"(?s)(.*?)((?: \(\w+\))?: )(.*)", text)
    if found is None:
        return _Problem(text, "", "")
    return _Problem(found[1], found[2], local_names(found[3], found[1]))


def _ranged(texts: Sequence[str]) -> str:
    """Texts that differ in their numbers as one."""
    parts = [_NUMBER.split(text) for text in texts]
    columns = list(zip(*parts, strict=True))
    for i in range(1, len(columns), 2):
        low, high = min(map(int, columns[i])), max(map(int, columns[i]))
        columns[i] = (str(low) if low == high else f"{low}-{high}",)
    return "".join(column[0] for column in columns)


def local_names(text: str, path: str) -> str:
    """Paths of neighbours as the layer's own module calls them, so that equal reasons read the same in each block."""
    parent = path.rpartition(".")[0]
    return text.replace(f"{parent}.", "") if parent else text
