"""Samples of a training or validation set, read, changed at random and batched, the same way in any process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...data.decoding import Unreadable
from ...errors import DataError, Fix, Text, first_line
from ...training.seeding import mixed_seed
from .sampler import Key

_TRIES = 100


@dataclass(frozen=True)
class Bad:
    """A sample that cannot be read, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Loaded:
    """One batch: what the collating function made of the samples, how many, and those that could not be read."""

    content: Any
    count: int
    bad: tuple[Bad, ...] = ()


Collate = Callable[[Sequence[Any]], Any]
Transform = Callable[[Any], Tensor]
"""Of a PIL image, to a float tensor `(C, H, W)`."""


class Samples(Dataset[Any]):
    """Reads the samples with the given keys as one `Loaded` batch.

    A training sample that is unreadable is replaced by another, so that batches keep their size; in validation it is
    left out. All that torch draws at random for a sample is decided by (seed, epoch, index), for a batch by its first.
    """

    def __init__(self, source: Any, collate: Collate, *, seed: int, replace: bool) -> None:
        self.source, self.collate, self.seed, self.replace = source, collate, seed, replace

    def __getitems__(self, keys: Sequence[Key]) -> Loaded:
        if isinstance(self.source, Tensors):
            return Loaded(self.source.batch([index for _, index in keys]), len(keys))
        bad: list[Bad] = []
        items = [item for key in keys for item in self._read(key, bad)]
        with _drawing(self.seed, *keys[0], plus=2):  # apart from what was drawn for that sample
            content = self.collate(items) if items else None
        return Loaded(content, len(items), tuple(bad))

    def _read(self, key: Key, bad: list[Bad]) -> list[Any]:
        epoch, index = key
        for attempt in range(_TRIES if self.replace else 1):
            try:
                with _drawing(self.seed, epoch, index):
                    return [self.source[index]]
            except Unreadable as error:
                bad.append(Bad(error.name, str(error)))
            index = (index + 7919 * (attempt + 1)) % len(self.source)
        return []


@contextmanager
def _drawing(seed: int, epoch: int, index: int, plus: int = 1) -> Iterator[None]:
    """Torch's random state (on the CPU) for one sample, or for a batch of them; it is put back."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(mixed_seed(seed, epoch, index, plus=plus))
    try:
        yield
    finally:
        torch.set_rng_state(before)


@dataclass(frozen=True)
class Tensors:
    """Samples in memory: inputs `(N, *)`, or a tuple of the arguments that a network takes, and labels `(N,)`.

    Batches are cut out without reading one by one.
    """

    inputs: Tensor | tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self._inputs(index), self.labels[index]

    def batch(self, indices: list[int]) -> tuple[Any, Tensor]:
        chosen = torch.tensor(indices)
        return self._inputs(chosen), self.labels[chosen]

    def _inputs(self, chosen: Any) -> Any:
        return tuple(x[chosen] for x in self.inputs) if isinstance(self.inputs, tuple) else self.inputs[chosen]


def spread(source: Any, count: int) -> Iterator[Any]:
    """Up to `count` samples from all over a set; those that cannot be read are left out."""
    stride = max(1, len(source) // count)
    for index in range(0, stride * min(count, len(source)), stride):
        try:
            yield source[index]
        except Unreadable:
            continue


class Skipped:
    """The samples of a run that could not be read, by name; more than `most` of them end it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.found: dict[str, Bad] = {}

    def add(self, several: Iterable[Bad]) -> None:
        """Raises DataError, naming them, once there are too many."""
        for bad in several:
            self.found.setdefault(bad.name, bad)
        count = len(self.found)
        if count > self._most:
            names = "\n".join(f"  {bad}" for bad in list(self.found.values())[:20])
            raise DataError(
                f"{count} image{'s' * (count != 1)} cannot be read:\n{names}\n",
                hint=Text("Remove or replace them, or allow more than ", Fix("max_bad", self._most), "."),
            )


class Loader:
    """Batches of one process; what could not be read goes to `skipped`. Worker processes, if any, stay for the run."""

    def __init__(
        self,
        samples: Samples,
        sampler: Iterable[list[Key]],
        workers: int,
        skipped: Skipped,
        *,
        pin: bool,
    ) -> None:
        self._samples, self._sampler, self._skipped = samples, sampler, skipped
        self._loader: Iterable[Loaded] | None = None
        if workers:
            self._loader = DataLoader(
                samples, batch_sampler=sampler, num_workers=workers, collate_fn=_same, persistent_workers=True,
                pin_memory=pin, generator=torch.Generator(),
            )  # fmt: skip

    def __iter__(self) -> Iterator[Loaded]:
        try:
            for batch in self._loader or map(self._samples.__getitems__, self._sampler):
                self._skipped.add(batch.bad)
                yield batch
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            raise DataError(
                f"reading the data failed in a worker process: {first_line(error)}",
                hint=Text(Fix("workers", 0), " reads in the main process and shows where."),
            ) from error


def _same(batch: Any) -> Any:
    return batch
