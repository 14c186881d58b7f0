"""Checks of single arguments, each with one sentence for the caller."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from .errors import Fix, OptionError, Text, did_you_mean

MOST_SEED = 2**32 - 1


def whole(name: str, value: Any, *, least: int = 1) -> None:
    """Raise OptionError for anything but an integer of at least that."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        kind = "a positive integer" if least == 1 else f"an integer from {least}"
        raise OptionError(Text(Fix(name), f" must be {kind}, got {value!r}"))


def number(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise OptionError for anything but a finite number above zero, or from zero."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):
        kind = "a number from 0" if zero else "a positive number"
        raise OptionError(Text(Fix(name), f" must be {kind}, got {value!r}"))


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise OptionError for a word that is none of these."""
    if value not in known:
        hint = did_you_mean(value, known) if isinstance(value, str) else None
        words = " or ".join(map(repr, known)) if len(known) < 3 else f"one of {', '.join(known)}"
        raise OptionError(Text(Fix(name), f" must be {words}, got {value!r}"), hint=hint)


def seed_value(name: str, value: Any) -> None:
    """Raise OptionError for anything but a seed that every generator takes: an integer from 0, below 2^32."""
    whole(name, value, least=0)
    if value > MOST_SEED:
        raise OptionError(Text(Fix(name), f" must be an integer from 0 to {MOST_SEED}, got {value!r}"))
