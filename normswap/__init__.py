"""normswap: replace the BatchNorm layers of a pretrained network and keep what they have learned.

Names are loaded on first use, so that `import normswap` and `normswap --help` cost nothing.
"""

from __future__ import annotations

import importlib

from .version import __version__ as __version__

TYPE_CHECKING = False  # type checkers take it for true; typing's own would be most of what importing this costs
if TYPE_CHECKING:
    from typing import Any

    from .advice.advise import advise as advise
    from .advice.report import Advice as Advice
    from .calibration.calibrate import calibrate as calibrate
    from .calibration.calibrate import estimate_statistics as estimate_statistics
    from .calibration.group_count import choose_groups as choose_groups
    from .calibration.report import CalibrationReport as CalibrationReport
    from .checkpoint.saving import load as load
    from .checkpoint.saving import save as save
    from .comparison.verification import VerificationReport as VerificationReport
    from .comparison.verification import verify as verify
    from .conversion.convert import convert as convert
    from .conversion.revert import revert as revert
    from .conversion.stabilize import stabilized as stabilized
    from .distillation.distil import distil as distil
    from .distillation.report import DistillationReport as DistillationReport
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
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.report import EvaluationReport as EvaluationReport
    from .exporting.export import export as export
    from .exporting.report import ExportReport as ExportReport
    from .finetuning.finetune import finetune as finetune
    from .finetuning.output.report import FinetuneReport as FinetuneReport
    from .freezing import FrozenDrift as FrozenDrift
    from .freezing import freeze as freeze
    from .freezing import frozen_drift as frozen_drift
    from .freezing import unfreeze as unfreeze
    from .inspection.inventory import Inventory as Inventory
    from .inspection.inventory import inspect as inspect
    from .norms._split import split_norm as split_norm
    from .norms.instance_adaptive import styled as styled
    from .norms.registry import register_norm as register_norm
    from .optimizers.remap import RemapReport as RemapReport
    from .optimizers.remap import remap_optimizer as remap_optimizer
    from .planning.plan import Plan as Plan
    from .planning.planner import plan as plan
    from .sweep.compare import compare as compare
    from .sweep.report import ComparisonReport as ComparisonReport

_HOME = {
    "Advice": "advice.report",
    "CalibrationReport": "calibration.report",
    "CheckpointError": "errors",
    "ComparisonReport": "sweep.report",
    "DataError": "errors",
    "DistillationReport": "distillation.report",
    "EvaluationReport": "evaluation.report",
    "ExportReport": "exporting.report",
    "FinetuneReport": "finetuning.output.report",
    "FrozenDrift": "freezing",
    "Interrupted": "errors",
    "Inventory": "inspection.inventory",
    "NetworkError": "errors",
    "NormswapError": "errors",
    "OptionError": "errors",
    "OutputError": "errors",
    "Plan": "planning.plan",
    "PlanError": "errors",
    "RemapReport": "optimizers.remap",
    "RevertError": "errors",
    "SelfCheckError": "errors",
    "SourceError": "errors",
    "TrainingError": "errors",
    "VerificationReport": "comparison.verification",
    "WeightsError": "errors",
    "advise": "advice.advise",
    "calibrate": "calibration.calibrate",
    "choose_groups": "calibration.group_count",
    "compare": "sweep.compare",
    "convert": "conversion.convert",
    "distil": "distillation.distil",
    "estimate_statistics": "calibration.calibrate",
    "evaluate": "evaluation.evaluate",
    "export": "exporting.export",
    "finetune": "finetuning.finetune",
    "freeze": "freezing",
    "frozen_drift": "freezing",
    "inspect": "inspection.inventory",
    "load": "checkpoint.saving",
    "plan": "planning.planner",
    "register_norm": "norms.registry",
    "remap_optimizer": "optimizers.remap",
    "revert": "conversion.revert",
    "save": "checkpoint.saving",
    "split_norm": "norms._split",
    "stabilized": "conversion.stabilize",
    "styled": "norms.instance_adaptive",
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
