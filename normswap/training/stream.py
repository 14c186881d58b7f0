"""An endless, seeded stream of batches that can start at any step: what makes a resumed run equal to a whole one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..data import Batches, ImageBatches, ImageData, as_batches, collated, is_pair, open_images
from ..errors import DataError

Args = tuple[Any, ...]
Epoch = Callable[[int, int], Iterator[Args]]


def seed_step(seed: int, step: int) -> None:
    """Seed torch's random state for one step: all that is random in it depends on nothing that went before."""
    value = (seed * 0x9E3779B1 + step * 0x85EBCA77 + 1) % 2**63
    torch.default_generator.manual_seed(value)
    # torch.manual_seed would note a traceback at every call for a CUDA that is not in use yet.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)


@dataclass(frozen=True)
class Stream:
    """Batches of forward's arguments, without end.

    epoch: gives one pass over the data in an order of its own (epoch's number, first batch). batches: how many a
    pass has, None where only iterating tells. images: how many images a pass has, if known.
    bad: images that could not be read so far.
    """

    seed: int
    epoch: Epoch
    batches: int | None = None
    images: int | None = None
    bad: Sequence[str] = ()

    def start(self, step: int) -> Generator[Args, None, None]:
        """From the batch of `step` on. The caller seeds each step before it takes its batch.

        Where the number of batches is unknown, or the caller's own loader decides on the order, the batches before
        `step` are read and dropped.
        """
        if self.batches is not None:
            number, first = divmod(step, self.batches)
            while True:
                yield from self.epoch(number, first)
                number, first = number + 1, 0
        batches = self._forever()
        for before in range(step):
            seed_step(self.seed, before)
            next(batches)
        seed_step(self.seed, step)
        yield from batches

    def _forever(self) -> Iterator[Args]:
        for number in itertools.count():
            yield from self.epoch(number, 0)


def stream_of(data: Any, batch_size: int, seed: int) -> Stream:
    """Read `data` in random order, each image once per pass.

    data: a tensor `(N, *)`, a Dataset, a folder's path, `ImageData` or `ImageBatches` are shuffled anew for each
    pass, in batches of one size (the rest of a pass is left out; an `ImageBatches` keeps its own batch size). A
    DataLoader or another iterable of batches decides on its own order and is iterated again and again; a generator
    is read into memory.

    Raises OptionError for a batch size below 1, and DataError for data that `as_batches` does not take.
    """
    as_batches((), batch_size)  # its check of the batch size
    if isinstance(data, (str, os.PathLike)):
        data = open_images(data)
    if isinstance(data, ImageData):
        data = data.batches(batch_size=batch_size)
    data = data[0] if is_pair(data) else data
    if isinstance(data, Tensor) and data.dim() > 0:
        return _indexed(len(data), batch_size, seed, lambda parts: (data[part] for part in parts))
    if isinstance(data, ImageBatches):
        return replace(_indexed(len(data.data), data.batch_size, seed, _of_files(data)), bad=data.bad)
    if isinstance(data, Dataset) and not isinstance(data, (IterableDataset, DataLoader)) and hasattr(data, "__len__"):
        samples: Dataset[Any] = data
        # No DataLoader: starting one takes a random number, at a step that depends on where a run was resumed.
        return _indexed(len(data), batch_size, seed, lambda parts: (collated([samples[i] for i in p]) for p in parts))
    batches = as_batches(data, batch_size)
    return Stream(seed, lambda number, first: (args for args, _ in batches))


def _indexed(count: int, batch_size: int, seed: int, read: Callable[[list[list[int]]], Iterator[Any]]) -> Stream:
    """A stream over data that can be read in any order: `read` gives the batches of the given indices."""
    if count == 0:
        raise DataError("data holds no image")
    size = min(batch_size, count)

    def epoch(number: int, first: int) -> Iterator[Args]:
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + number) % 2**63)
        order = torch.randperm(count, generator=generator).tolist()
        parts = [order[i : i + size] for i in range(0, count - size + 1, size)]
        return (args for args, _ in Batches(_once(read(parts[first:]))))

    return Stream(seed, epoch, count // size, count)


class _once:
    """An iterable that `Batches` may iterate a single time."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator = iterator

    def __iter__(self) -> Iterator[Any]:
        return self.iterator


def _of_files(batches: ImageBatches) -> Callable[[list[list[int]]], Iterator[Any]]:
    data, transform = batches.data, batches._settled()  # one size for all, whichever image comes first

    def read(parts: Sequence[Sequence[int]]) -> Iterator[Any]:
        files = tuple(data.files[i] for part in parts for i in part)
        size = len(parts[0]) if parts else 1
        return iter(
            replace(batches, data=replace(data, files=files, labels=None), transform=transform, batch_size=size)
        )

    return read
