"""The words that options take, each set once: for the Python API, the command line and its completion.

Norms say their names in their own files, and a norm of your own is one more word for `to`. Imports no library.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

Role = Literal["backbone", "fpn", "head"]
Indivisible = Literal["error", "nearest"]
Transfer = Literal["fold", "copy", "reset"]
MissingStatistics = Literal["error", "later"]
Method = Literal["balance", "refit", "moments"]
StandIn = Literal["photos", "synthetic"]
Parameters = Literal["all", "norm"]
Loss = Literal["auto", "match"]
Task = Literal["classification", "detection", "segmentation"]
Purpose = Literal["classification", "detection", "segmentation", "style", "sequence"]
Optimizer = Literal["adamw", "sgd"]
Precision = Literal["fp32", "bf16", "fp16"]
Augment = Literal["auto", "flip", "none"]
Export = Literal["onnx", "torchscript", "exported"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]
Device = Literal["auto", "cpu", "cuda", "mps"]
# At PIL's numbers, which transformers stores as `resample`.
Interpolation = Literal["nearest", "lanczos", "bilinear", "bicubic"]

# What validation gives, by task, without `val_`; the first decides by default which network is the best.
MONITORS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "loss"),
    "detection": ("map", "map_50", "map_75", "mask_map", "mask_map_50"),
    "segmentation": ("miou", "pixel_accuracy", "loss"),
}
ROLES: tuple[str, ...] = get_args(Role)
INDIVISIBLE: tuple[str, ...] = get_args(Indivisible)
TRANSFERS: tuple[str, ...] = get_args(Transfer)
MISSING_STATISTICS: tuple[str, ...] = get_args(MissingStatistics)
METHODS: tuple[str, ...] = get_args(Method)
STAND_INS: tuple[str, ...] = get_args(StandIn)
PARAMETERS: tuple[str, ...] = get_args(Parameters)
LOSSES: tuple[str, ...] = get_args(Loss)
TASKS: tuple[str, ...] = get_args(Task)
PURPOSES: tuple[str, ...] = get_args(Purpose)
OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
PRECISIONS: tuple[str, ...] = get_args(Precision)
AUGMENTS: tuple[str, ...] = get_args(Augment)
EXPORTS: tuple[str, ...] = get_args(Export)
TRACKERS: tuple[str, ...] = get_args(Tracker)
DEVICES: tuple[str, ...] = get_args(Device)
INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)


def _names_of_norms() -> list[str]:
    """What `norms.registry.targets()` gives, without torch, which that imports; a test compares the two."""
    files = sorted((Path(__file__).parent / "norms").glob("*.py"))
    return [name for file in files for name in re.findall(r'^ +name="(.+)",$', file.read_text("utf-8"), re.MULTILINE)]


NORMS: tuple[str, ...] = tuple(_names_of_norms())
