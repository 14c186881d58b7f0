"""normswap: replace the BatchNorm layers of a pretrained network and keep what they have learned.

Names are loaded on first use, so that `import normswap` and `normswap --help` cost nothing.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers take it for true; typing's own would be most of what importing this costs
if TYPE_CHECKING:
    from typing import Any

    from .calibration import calibrate as calibrate
    from .calibration import choose_groups as choose_groups
    from .calibration import estimate_statistics as estimate_statistics
    from .checkpoint import load as load
    from .checkpoint import save as save
    from .conversion import convert as convert
    from .errors import NormswapError as NormswapError
    from .finetuning.run import finetune as finetune
    from .freezing import FrozenDrift as FrozenDrift
    from .freezing import freeze as freeze
    from .freezing import frozen_drift as frozen_drift
    from .freezing import unfreeze as unfreeze
    from .inventory import Inventory as Inventory
    from .inventory import inspect as inspect
    from .optimizers import RemapReport as RemapReport
    from .optimizers import remap_optimizer as remap_optimizer
    from .planning import Plan as Plan
    from .planning import plan as plan
    from .stabilizing import stabilized as stabilized
    from .training.distillation import distil as distil
    from .undo import revert as revert
    from .verification import verify as verify

_HOME = {
    "FrozenDrift": "freezing",
    "Inventory": "inventory",
    "NormswapError": "errors",
    "Plan": "planning",
    "RemapReport": "optimizers",
    "calibrate": "calibration",
    "choose_groups": "calibration",
    "convert": "conversion",
    "distil": "training.distillation",
    "estimate_statistics": "calibration",
    "finetune": "finetuning.run",
    "freeze": "freezing",
    "frozen_drift": "freezing",
    "inspect": "inventory",
    "load": "checkpoint",
    "plan": "planning",
    "remap_optimizer": "optimizers",
    "revert": "undo",
    "save": "checkpoint",
    "stabilized": "stabilizing",
    "unfreeze": "freezing",
    "verify": "verification",
}

_MODULES = ("data", "detection")

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
