"""The batches of each step, in the order that its number and the seed give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..datasets.loader import Loaded, Loader, Samples, Skipped
from ..datasets.sampler import ResumableBatchSampler, ValidationSampler
from ..datasets.splits import Sets
from ..settings import RunOptions, Settings
from ..tasks.base import Task


class Batches:
    """Those of training, from any step on, and those of validation, None where there is no such set.

    skipped: what could not be read.
    """

    def __init__(self, task: Task, settings: Settings, place: RunOptions, sets: Sets, accelerator: Any) -> None:
        shared = {"processes": accelerator.num_processes, "rank": accelerator.process_index}
        self.skipped = Skipped(place.max_bad)
        workers, pin = place.workers or 0, accelerator.device.type == "cuda"
        self._settings = settings
        self._order = ResumableBatchSampler(
            settings.samples, settings.batch_size, settings.seed, settings.accumulate, **shared
        )
        samples = Samples(sets.train, task.collate, seed=settings.seed, replace=True)
        self._train = Loader(samples, self._order, workers, self.skipped, pin=pin)
        self._epoch: Iterator[Loaded] | None = None
        self.validation: Loader | None = None
        if sets.validation is not None:
            turns = ValidationSampler(len(sets.validation), max(settings.batch_size, task.at_once), **shared)
            samples = Samples(sets.validation, task.collate, seed=settings.seed, replace=False)
            self.validation = Loader(samples, turns, workers, self.skipped, pin=pin)

    def of_step(self, step: int) -> list[Loaded]:
        """`accumulate` of them. To be asked for one step after another."""
        number, first = divmod(step, self._settings.epoch)
        if first == 0 or self._epoch is None:
            self._order.start(number, first)
            self._epoch = iter(self._train)
        return [next(self._epoch) for _ in range(self._settings.accumulate)]

    def close(self) -> None:
        """Leave off within an epoch."""
        self._epoch = None
