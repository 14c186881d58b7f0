"""What decides the result of a fine-tuning, and what only decides where and how it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from ..errors import OptionError

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
OPTIMIZERS = ("adamw", "sgd")
DEVICES = ("auto", "cpu", "cuda", "mps")
_COUNTS = ("steps", "batch_size", "accumulate", "processes", "samples")
_POSITIVE = ("lr",)
_FROM_ZERO = ("weight_decay", "distill", "label_smoothing", "warmup", "ema")


@dataclass(frozen=True)
class Settings:
    """By these one run differs from another; a resumed run must have the same.

    steps: optimizer steps of the whole run. batch_size: samples of one forward pass of one process. accumulate:
    forward passes of a step. lr: the largest. warmup: share of the steps in which it rises. train: "all", "norm",
    "head" or a pattern of parameter names. distill: share of the loss that follows the teacher, 0 to 1. ema: decay
    of the averaged weights, 0 for none. stabilize: see `stabilizing`. samples: of the training set. network: a digest
    of the converted network. task: what is learnt. frozen: which parts of all norms. augment, prepare: how pictures
    are changed and prepared. data: a digest of what is trained on.
    """

    steps: int
    batch_size: int
    accumulate: int
    processes: int
    samples: int
    lr: float
    optimizer: str
    weight_decay: float
    warmup: float
    clip_grad: float | None
    train: str
    distill: float
    ema: float
    label_smoothing: float
    precision: str
    stabilize: bool
    seed: int
    network: str
    task: str = "classification"
    frozen: str = ""
    augment: str = "auto"
    prepare: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            whole(name, getattr(self, name), least=1)
        whole("seed", self.seed, least=0)
        for name in (*_POSITIVE, *_FROM_ZERO, "clip_grad"):
            value = getattr(self, name)
            if name == "clip_grad" and value is None:
                continue
            number(name, value, zero=name in _FROM_ZERO)
        for name in ("distill", "label_smoothing", "warmup", "ema"):
            if getattr(self, name) > 1 or (name != "distill" and getattr(self, name) == 1):
                raise OptionError(f"{name} must be a share of 1, got {getattr(self, name)!r}")
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("precision", self.precision, tuple(PRECISIONS))

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self.batch_size * self.accumulate * self.processes

    @property
    def epoch(self) -> int:
        """Steps of one pass over the training set; what is left over at its end waits for another pass."""
        return self.samples // self.global_batch


@dataclass(frozen=True)
class Place:
    """Where and how a run is carried out; none of it should change the result by more than rounding.

    output: the folder for its files, None to write none. every: epochs between two validations and checkpoints.
    """

    output: Path | None = None
    device: str = "auto"
    workers: int | None = None
    channels_last: bool | None = None
    compile: bool = False
    max_bad: int = 10
    every: int = 1
    tensorboard: bool = False

    def __post_init__(self) -> None:
        one_of("device", self.device, DEVICES)
        whole("every", self.every, least=1)
        whole("max_bad", self.max_bad, least=0)
        if self.workers is not None:
            whole("workers", self.workers, least=0)


def whole(name: str, value: Any, *, least: int) -> None:
    """Raise OptionError for anything but an integer of at least that."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        kind = "a positive integer" if least == 1 else f"an integer from {least}"
        raise OptionError(f"{name} must be {kind}, got {value!r}")


def number(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise OptionError for anything but a finite number above zero, or from zero."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):
        raise OptionError(f"{name} must be {'a number from 0' if zero else 'a positive number'}, got {value!r}")


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise OptionError for a word that is none of these."""
    if value not in known:
        raise OptionError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
