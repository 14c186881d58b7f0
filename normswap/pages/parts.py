"""What the page is put together from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..display.printable import printable


@dataclass(frozen=True)
class Chart:
    """A picture, and the numbers in it for whoever cannot see it."""

    title: str
    text: str
    svg: Markup
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def number(value: Any) -> str:
    """For people; empty for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return printable(str(value))
    return f"{value:.4f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"
