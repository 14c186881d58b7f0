"""What decides the result of a distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import OptionError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """The arguments of `distil` by which one run differs from another; a resumed run must have the same.

    network: a digest of the architecture and of how it was converted.
    """

    steps: int
    batch_size: int
    lr: float
    temperature: float
    train: str
    weight_decay: float
    seed: int
    precision: str
    max_grad_norm: float | None
    augment: bool
    loss: str
    network: str
    features: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            positive_integer(name, getattr(self, name))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise OptionError(f"seed must be an integer from 0, got {self.seed!r}")
        for name in ("lr", "temperature", "max_grad_norm"):
            value = getattr(self, name)
            if not (name == "max_grad_norm" and value is None) and not _positive(value):
                raise OptionError(f"{name} must be a positive number, got {value!r}")
        for name in ("weight_decay", "features"):
            value = getattr(self, name)
            if value != 0 and not _positive(value):
                raise OptionError(f"{name} must be a number from 0, got {value!r}")
        for name, known in (("precision", tuple(PRECISIONS)), ("loss", ("auto", "match")), ("train", ("all", "norm"))):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} must be {' or '.join(map(repr, known))}, got {getattr(self, name)!r}")


def positive_integer(name: str, value: Any) -> None:
    """Raise OptionError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name} must be a positive integer, got {value!r}")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
