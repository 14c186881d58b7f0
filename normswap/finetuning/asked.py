"""What `finetune` was asked for, settled: with the data and the processes at hand, how long, how fast, by whom."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from ..arguments import whole
from ..choices import MONITORS
from ..errors import DataError, Fix, OptionError, Text
from .engine.optimizer import default_rate
from .engine.trainer import Job
from .settings import RunOptions, Settings

EPOCHS = 10


@dataclass(frozen=True)
class Asked:
    """What was asked for that is settled once the data, the processes and the network's parts are known."""

    epochs: int | None
    steps: int | None
    lr: float | None
    classes: int | None
    reference: nn.Module | None
    freeze_stats: bool
    freeze_affine: bool


def name_of(preprocess: Any) -> str:
    """The same in every run: functions by their names, not by where they lie in memory."""
    name = getattr(preprocess, "__qualname__", None)
    if name is not None:
        return f"{preprocess.__module__}.{name}"
    return "" if preprocess is None else re.sub(r" at 0x[0-9a-fA-F]+", "", str(preprocess))


def monitored(task: str, name: str | None) -> str | None:
    """A figure to monitor as `Settings` has it, without `val_`; None for the task's usual one."""
    name = name.removeprefix("val_") if isinstance(name, str) else name
    return None if name == MONITORS.get(task, (None,))[0] else name


def check_settings(said: Mapping[str, Any]) -> None:
    """Raise OptionError for arguments of `finetune` that no network and no data would make good."""
    known = {field.name for field in fields(Settings)} - {"steps", "monitor", "stabilize"}
    given: dict[str, Any] = {
        name: said[name] or None if name in ("mixup", "cutmix") else said[name] for name in known & said.keys()
    }
    given |= {"lr": 1.0 if said["lr"] is None else said["lr"]}
    Settings(steps=1, processes=1, samples=1, network="", stabilize=True, **given)
    RunOptions(device=said["device"], workers=said["workers"], checkpoint_every=said["checkpoint_every"])


def settled(job: Job, asked: Asked, accelerator: Any) -> Job:
    """With what depends on the data and on how many processes there are. Raises OptionError, DataError."""
    for name in ("patience", "monitor"):
        if getattr(job.settings, name) is not None and job.sets.validation is None:
            raise OptionError(
                Text(Fix(name), " needs validation images, and there are none"),
                hint=Text(Fix("eval_data"), " names them."),
            )
    settings = replace(job.settings, processes=accelerator.num_processes, samples=len(job.sets.train))
    settings = replace(settings, steps=_steps(settings, asked.epochs, asked.steps))
    if asked.lr is None:
        settings = replace(settings, lr=default_rate(settings.optimizer, settings.global_batch))
    return replace(job, settings=settings, place=replace(job.place, workers=_workers(job.place, accelerator)))


def _steps(settings: Settings, epochs: int | None, steps: int | None) -> int:
    if epochs is not None and steps is not None:
        raise OptionError(Text(Fix("epochs"), " and ", Fix("steps"), " exclude each other"))
    if settings.epoch == 0:
        raise DataError(
            f"the training set has {settings.samples} samples, fewer than a step takes ({settings.global_batch})",
            hint=Text("Lower ", Fix("batch_size"), " or ", Fix("accumulate"), "."),
        )
    if steps is not None:
        whole("steps", steps)
        return steps
    whole("epochs", EPOCHS if epochs is None else epochs)
    return (EPOCHS if epochs is None else epochs) * settings.epoch


def _workers(place: RunOptions, accelerator: Any) -> int:
    """On a GPU, up to 8 processes that read images; on a CPU none, since training takes all of it."""
    if place.workers is not None:
        return place.workers
    if accelerator.device.type == "cpu":
        return 0
    return min(8, (os.cpu_count() or 1) // accelerator.num_processes)
