"""One panel of the page of curves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One of the plots in curves.png: the figures whose names match one of `names`, which may have wildcards."""

    title: str
    names: tuple[str, ...]
