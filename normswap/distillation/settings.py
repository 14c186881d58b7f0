"""What decides the result of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..arguments import number, one_of, seed_value, whole
from ..choices import AUGMENTS, LOSSES, PARAMETERS
from ..files.writing import check_writable
from ..training.schedule import Schedule

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP, FINAL = 0.1, 0.01


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
    augment: str
    loss: str
    network: str
    features: float = 0.0

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        whole("batch_size", self.batch_size)
        seed_value("seed", self.seed)
        for name in ("lr", "temperature", "weight_decay", "features"):
            number(name, getattr(self, name), zero=name in ("weight_decay", "features"))
        if self.max_grad_norm is not None:
            number("max_grad_norm", self.max_grad_norm)
        one_of("precision", self.precision, tuple(PRECISIONS))
        one_of("augment", self.augment, AUGMENTS)
        one_of("loss", self.loss, LOSSES)
        one_of("train", self.train, PARAMETERS)

    @property
    def schedule(self) -> Schedule:
        """The learning rate of each step: it rises over the first tenth of them."""
        return Schedule(self.lr, max(1, round(WARM_UP * self.steps)) - 1, self.steps - 1, FINAL)


@dataclass(frozen=True)
class Kept:
    """Where the state of a run is kept, after how many steps each time, and the file of one to go on from."""

    file: Path | None
    every: int
    resume: Path | None

    def __post_init__(self) -> None:
        whole("checkpoint_every", self.every)
        if self.file is not None:
            check_writable(self.file, overwrite=True)
