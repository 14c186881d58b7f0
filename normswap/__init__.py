"""normswap: replace the BatchNorm layers of a pretrained network and keep what they have learned.

Names are loaded on first use, so that `import normswap` and `normswap --help` cost nothing.
"""

from __future__ import annotations

import importlib

from .version import __version__ as __version__

TYPE_CHECKING = False  # type checkers take it for true; typing's own would be most of what importing this costs
if TYPE_CHECKING:
    from typing import Any

    from .calibration.calibrate import calibrate as calibrate
    from .calibration.calibrate import estimate_statistics as estimate_statistics
    from .checkpoint.saving import load as load
    from .checkpoint.saving import save as save
    from .comparison.verification import verify as verify
    from .conversion.convert import convert as convert
    from .conversion.revert import revert as revert
    from .conversion.stabilize import stabilized as stabilized
    from .distillation.distil import distil as distil
    from .errors import NormswapError as NormswapError
    from .finetuning.finetune import finetune as finetune
    from .freezing import FrozenDrift as FrozenDrift
    from .freezing import freeze as freeze
    from .freezing import frozen_drift as frozen_drift
    from .freezing import unfreeze as unfreeze
    from .inspection.inventory import Inventory as Inventory
    from .inspection.inventory import inspect as inspect
    from .optimizers.remap import RemapReport as RemapReport
    from .optimizers.remap import remap_optimizer as remap_optimizer
    from .planning.plan import Plan as Plan
    from .planning.planner import plan as plan

_HOME = {
    "FrozenDrift": "freezing",
    "Inventory": "inspection.inventory",
    "NormswapError": "errors",
    "Plan": "planning.plan",
    "RemapReport": "optimizers.remap",
    "calibrate": "calibration.calibrate",
    "convert": "conversion.convert",
    "distil": "distillation.distil",
    "estimate_statistics": "calibration.calibrate",
    "finetune": "finetuning.finetune",
    "freeze": "freezing",
    "frozen_drift": "freezing",
    "inspect": "inspection.inventory",
    "load": "checkpoint.saving",
    "plan": "planning.planner",
    "remap_optimizer": "optimizers.remap",
    "revert": "conversion.revert",
    "save": "checkpoint.saving",
    "stabilized": "conversion.stabilize",
    "unfreeze": "freezing",
    "verify": "comparison.verification",
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
