"""Checks of single arguments, each with one sentence for the caller."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from .errors import OptionError

SEEDS = 2**63 - 1
"""The largest seed that torch takes everywhere."""


def whole(name: str, value: Any, *, least: int = 1) -> None:
    """Raise OptionError for anything but an integer of at least that."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        kind = "a positive integer" if least == 1 else f"an integer from {least}"
        raise OptionError(f"{name} must be {kind}, got {value!r}")


def seed(value: Any) -> None:
    """Raise OptionError for anything but an integer that torch takes as a seed."""
    whole("seed", value, least=0)
    if int(value) > SEEDS:
        raise OptionError(f"seed must be at most {SEEDS}, got {value!r}")


def number(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise OptionError for anything but a finite number above zero, or from zero."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):
        raise OptionError(f"{name} must be {'a number from 0' if zero else 'a positive number'}, got {value!r}")


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise OptionError for a word that is none of these."""
    if value not in known:
        raise OptionError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
