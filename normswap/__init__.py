"""normswap: replace the BatchNorm layers of a pretrained network and keep what they have learned.

Names are loaded on first use, so that `import normswap` and `normswap --help` cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .conversion import convert
    from .errors import NormswapError
    from .inventory import Inventory, inspect
    from .planning import Plan, plan
    from .undo import revert

_HOME = {
    "Inventory": "inventory",
    "NormswapError": "errors",
    "Plan": "planning",
    "convert": "conversion",
    "inspect": "inventory",
    "plan": "planning",
    "revert": "undo",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
