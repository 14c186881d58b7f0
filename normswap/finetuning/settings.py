"""What decides the result of a fine-tuning, and what only decides where and how it runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..arguments import number, one_of, seed_value, whole
from ..choices import DEVICES, MONITORS, OPTIMIZERS, TRACKERS
from ..errors import Fix, OptionError, Text
from ..machine.limits import check_workers
from ..training.schedule import Schedule
from .output.layout import LAST
from .output.trackers import check_installed

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
    of the averaged weights, 0 for none. stabilize: see `conversion.stabilize`. samples: of the training set.
    network: a digest of the converted network. task: what is learnt. frozen: which parts of all norms. augment,
    prepare: how pictures are changed and prepared. data: a digest of what is trained on. patience: validations in a row
    without a better figure after which the run ends. monitor: that figure, where it is not the task's usual one.
    mixup, cutmix: see `datasets.mixing`. rand_augment: how many random changes of a picture.

    What came later is None where it is not in use, as it is for the state of a run of before.
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
    patience: int | None = None
    monitor: str | None = None
    mixup: float | None = None
    cutmix: float | None = None
    rand_augment: int | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            whole(name, getattr(self, name))
        seed_value("seed", self.seed)
        for name in (*_POSITIVE, *_FROM_ZERO, "clip_grad"):
            value = getattr(self, name)
            if name == "clip_grad" and value is None:
                continue
            number(name, value, zero=name in _FROM_ZERO)
        for name in ("distil", "label_smoothing", "warmup", "ema"):
            if getattr(self, name) > 1 or (name != "distil" and getattr(self, name) == 1):
                raise OptionError(Text(Fix(name), f" must be a share of 1, got {getattr(self, name)!r}"))
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("precision", self.precision, tuple(PRECISIONS))
        for name in ("patience", "rand_augment"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        for name in ("mixup", "cutmix"):
            if getattr(self, name) is not None:
                self._check_mixing(name, getattr(self, name))
        if self.monitor is not None:
            one_of("monitor", self.monitor, MONITORS[self.task])

    def _check_mixing(self, name: str, alpha: float) -> None:
        number(name, alpha)
        if self.batch_size == 1:
            raise OptionError(
                Text(Fix(name), " mixes the pictures of a batch, and batches have a single one"),
                hint=Text(Fix("batch_size", 2), " or more."),
            )

    @property
    def schedule(self) -> Schedule:
        """The learning rate of each step: it falls to zero after the last one."""
        return Schedule(self.lr, round(self.warmup * self.steps), self.steps)

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self.batch_size * self.accumulate * self.processes

    @property
    def epoch(self) -> int:
        """Steps of one pass over the training set; what is left over at its end waits for another pass."""
        return self.samples // self.global_batch

    @property
    def length(self) -> str:
        """`3 epochs (12 steps)`, or `10 steps` where they are no whole epochs."""
        steps, epochs = (f"{n} {unit}{'s' * (n != 1)}" for n, unit in ((self.steps, "step"), (self._epochs, "epoch")))
        return f"{epochs} ({steps})" if self._epochs * self.epoch == self.steps else steps

    @property
    def length_option(self) -> Fix:
        """What to give for it."""
        whole_epochs = self._epochs * self.epoch == self.steps
        name, count = ("epochs", self._epochs) if whole_epochs else ("steps", self.steps)
        return Fix(name, count)

    @property
    def _epochs(self) -> int:
        return self.steps // max(1, self.epoch)


def refuse(path: Path, was: Mapping[str, Any], settings: Settings) -> frozenset[str]:
    """Raise OptionError, in the words of who asks, where a run that began with other settings cannot go on.

    Returns the settings that differ only since they follow from others that do: nobody gave them.

    was: the settings of the state in `path`. The learning rate of a step depends on the length of the whole run, so a
    longer one would not be what it had been from the start.
    """
    differing = {name for name, value in vars(settings).items() if was.get(name) != value}
    if "network" in differing:
        return frozenset()  # which matters more, and has words of its own
    if differing & {"data", "samples"}:
        raise OptionError(
            f"{path} is the state of a run on other data",
            hint=Text("Resume with the ", Fix("data"), " that it began with."),
        )
    if differing == {"steps"}:
        begun = replace(settings, steps=was["steps"])
        raise OptionError(
            f"{path} is the state of a run of {begun.length}, which cannot become one of {settings.length}: "
            "its learning rate falls to zero over its length",
            hint=Text(
                "Resume with ",
                begun.length_option,
                f". To train for longer, begin another run from {path.with_name(LAST)}, in another ",
                Fix("output"),
                ".",
            ),
        )
    if "processes" in differing:
        begun = was["processes"]
        same = f"torchrun and {begun} processes, on one node or several" if begun > 1 else "a single one"
        anew = f"begin another run from {path.with_name(LAST)}, in another "
        raise OptionError(
            f"{path} is the state of a run with processes: {begun} (now {settings.processes})",
            hint=Text(
                f"Resume with {same}. To train with {settings.processes}, {anew}",
                Fix("output"),
                ".",
            ),
        )
    return _FOLLOWING if differing & _LEADING else frozenset()


_LEADING = frozenset(("batch_size", "accumulate", "optimizer"))
_FOLLOWING = frozenset(("steps", "lr"))  # where the user gives epochs, and no rate
_EVERY = re.compile(r"(\d+(?:\.\d+)?) *(step|minute|min|hour|h)?s?")
_SECONDS = {"minute": 60.0, "min": 60.0, "hour": 3600.0, "h": 3600.0}


@dataclass(frozen=True)
class Every:
    """How often: so many steps, or seconds; one of the two."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, said: int | str | None) -> Every:
        """`"500 steps"`, `"10 minutes"`, `"1 hour"`; a number alone is of steps. Raises OptionError."""
        if said is None:
            return cls()
        match = _EVERY.fullmatch(str(said).strip().lower())
        number, unit = (float(match[1]), match[2] or "step") if match else (0.0, "")
        if number <= 0 or (unit == "step" and number % 1):
            known = "500 steps or 10 minutes, where a number alone is of steps"
            raise OptionError(Text(Fix("checkpoint_every"), f" must be as {known}, got {said!r}"))
        return cls(steps=int(number)) if unit == "step" else cls(seconds=number * _SECONDS[unit])


@dataclass(frozen=True)
class RunOptions:
    """Where and how a run is carried out; none of it should change the result by more than rounding.

    output: the folder for its files, None to write none. resume: go on with the run that is in it; overwrite: replace
    that run. checkpoint_every: when the state is written besides the ends of epochs, see `Every`.
    track: trackers that get the figures, beside TensorBoard. Raises NormswapError for one that is not installed.
    """

    output: Path | None = None
    device: str = "auto"
    workers: int | None = None
    channels_last: bool | None = None
    compile: bool = False
    max_bad: int = 10
    tensorboard: bool = False
    resume: bool = False
    overwrite: bool = False
    checkpoint_every: int | str | None = None
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.device, str) and re.fullmatch(r"cuda:\d+", self.device)):
            one_of("device", self.device, DEVICES)
        whole("max_bad", self.max_bad, least=0)
        Every.of(self.checkpoint_every)
        for name in self.track:
            one_of("track", name, TRACKERS)
        check_installed((*self.track, *(["tensorboard"] if self.tensorboard else [])))
        if self.workers is not None:
            whole("workers", self.workers, least=0)
            check_workers(self.workers)
