"""Paths of many layers in one text, for tables; see `path_ranges`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...modules.path_ranges import collapse, local_names

_NUMBER = re.compile(r"(\d+)")


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
