"""What decides the result of a fine-tuning, and what only decides where and how it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..choices import DEVICES, OPTIMIZERS
from ..errors import OptionError
from ..values import number, one_of, whole

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_COUNTS = ("steps", "batch_size", "accumulate", "processes", "samples")
_POSITIVE = ("lr",)
_FROM_ZERO = ("weight_decay", "distil", "label_smoothing", "warmup", "ema")


@dataclass(frozen=True)
class Settings:
    """By these one run differs from another; a resumed run must have the same.

    steps: optimizer steps of the whole run. batch_size: samples of one forward pass of one process. accumulate:
    forward passes of a step. lr: the largest. warmup: share of the steps in which it rises. train: "all", "norm",
    "head" or a pattern of parameter names. distil: share of the loss that follows the teacher, 0 to 1. ema: decay
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
    distil: float
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
            whole(name, getattr(self, name))
        whole("seed", self.seed, least=0)
        for name in (*_POSITIVE, *_FROM_ZERO, "clip_grad"):
            value = getattr(self, name)
            if name == "clip_grad" and value is None:
                continue
            number(name, value, zero=name in _FROM_ZERO)
        for name in ("distil", "label_smoothing", "warmup", "ema"):
            if getattr(self, name) > 1 or (name != "distil" and getattr(self, name) == 1):
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

    output: the folder for its files, None to write none.
    """

    output: Path | None = None
    device: str = "auto"
    workers: int | None = None
    channels_last: bool | None = None
    compile: bool = False
    max_bad: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        one_of("device", self.device, DEVICES)
        whole("max_bad", self.max_bad, least=0)
        if self.workers is not None:
            whole("workers", self.workers, least=0)
