"""normswap: replace the BatchNorm layers of a pretrained network and keep what they have learned.

Names are loaded on first use, so that `import normswap` and `normswap --help` cost nothing.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers take it for true; typing's own would be most of what importing this costs
if TYPE_CHECKING:
    from typing import Any

    from .calibration import CalibrationReport as CalibrationReport
    from .calibration import calibrate as calibrate
    from .calibration import choose_groups as choose_groups
    from .calibration import estimate_statistics as estimate_statistics
    from .checkpoint import load as load
    from .checkpoint import save as save
    from .conversion import convert as convert
    from .errors import CheckpointError as CheckpointError
    from .errors import DataError as DataError
    from .errors import Interrupted as Interrupted
    from .errors import NetworkError as NetworkError
    from .errors import NormswapError as NormswapError
    from .errors import OptionError as OptionError
    from .errors import OutputError as OutputError
    from .errors import PlanError as PlanError
    from .errors import RevertError as RevertError
    from .errors import SelfCheckError as SelfCheckError
    from .errors import SourceError as SourceError
    from .errors import TrainingError as TrainingError
    from .errors import WeightsError as WeightsError
    from .finetuning.report import FinetuneReport as FinetuneReport
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
    from .training.report import DistillationReport as DistillationReport
    from .undo import revert as revert
    from .verification import VerificationReport as VerificationReport
    from .verification import verify as verify

_HOME = {
    "CalibrationReport": "calibration.report",
    "CheckpointError": "errors",
    "DataError": "errors",
    "DistillationReport": "training.report",
    "FinetuneReport": "finetuning.report",
    "FrozenDrift": "freezing",
    "Interrupted": "errors",
    "Inventory": "inventory",
    "NetworkError": "errors",
    "NormswapError": "errors",
    "OptionError": "errors",
    "OutputError": "errors",
    "Plan": "planning",
    "PlanError": "errors",
    "RemapReport": "optimizers",
    "RevertError": "errors",
    "SelfCheckError": "errors",
    "SourceError": "errors",
    "TrainingError": "errors",
    "VerificationReport": "verification",
    "WeightsError": "errors",
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
