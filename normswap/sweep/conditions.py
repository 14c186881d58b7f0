"""What is equal for all cells of a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arguments import number, one_of, seed_value, whole
from ..choices import AUGMENTS, OPTIMIZERS
from ..choices import Task as TaskName
from ..errors import OptionError, plainly
from ..files.writing import atomic
from ..finetuning.datasets.splits import Sets
from ..finetuning.finetune import task_of
from ..finetuning.tasks.base import Task

CONDITIONS = "compare.json"


@dataclass(frozen=True)
class Conditions:
    """Seed, images and settings, the same in every cell. Checks itself.

    task: that of `finetune`. images: how many to calibrate on. epochs, lr, optimizer, augment: of training; lr None is
    scaled by the batch, the same for every norm. network, data: digests, so that no other network or data is taken for
    the same.
    """

    seed: int = 0
    images: int = 256
    epochs: int | None = None
    lr: float | None = None
    optimizer: str = "adamw"
    augment: str = "auto"
    network: str = ""
    data: str = ""
    task: TaskName = "classification"

    def __post_init__(self) -> None:
        seed_value("seed", self.seed)
        whole("images", self.images)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("augment", self.augment, AUGMENTS)
        if self.epochs is not None:
            whole("epochs", self.epochs)
        if self.lr is not None:
            number("lr", self.lr)

    def keep(self, folder: Path, *, overwrite: bool) -> None:
        """Write them to the folder of the comparison; what was begun there goes on under the same ones only.

        Raises OptionError for others, OutputError for a folder that cannot be written.
        """
        path = folder / CONDITIONS
        now = json.loads(json.dumps(asdict(self)))
        was = None if overwrite else _read(path)
        if was is not None:
            was = {"task": "classification", **was}  # of before there were others
        differing = [name for name, value in now.items() if was is not None and was.get(name) != value]
        if was is not None and differing:
            found = ", ".join(f"{name} {plainly(was.get(name))} (now {plainly(now[name])})" for name in differing)
            raise OptionError(
                f"{folder} is a comparison with {found}", hint="Name another folder, or have this one replaced."
            )
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class Setting:
    """Where cells are made: their conditions, the sets, and what turns a picture into an input.

    class_names: what the network's classes are called, where that is known.
    """

    conditions: Conditions
    sets: Sets
    folder: Path
    preprocess: Callable[[Any], Tensor] | None = None
    device: str = "auto"
    workers: int | None = None
    max_bad: int = 10
    class_names: tuple[str, ...] | None = None

    @property
    def task(self) -> Task:
        """A new one, which knows nothing yet."""
        return task_of(self.conditions.task)

    @property
    def figure(self) -> str:
        """What is compared, one of `FIGURES`."""
        return self.task.best.removeprefix("val_")

    def of(self, cell: str) -> Path:
        """The folder of one cell."""
        return self.folder / "cells" / cell

    def with_digests(self, network: str) -> Setting:
        """Knowing which network and data it is about."""
        return replace(self, conditions=replace(self.conditions, network=network, data=self.sets.digest))
