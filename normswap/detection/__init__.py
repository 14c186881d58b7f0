"""Detectors: converted part by part, built, frozen by stage. The names here are public."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .detectors import convert as convert
    from .detectors import detector as detector
    from .detectors import freeze_stages as freeze_stages

_HOME = {
    "convert": "detectors",
    "detector": "detectors",
    "freeze_stages": "detectors",
}

__all__ = ["convert", "detector", "freeze_stages"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
