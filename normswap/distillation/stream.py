"""An endless, seeded stream of batches that can start at any step: what makes a resumed run equal to a whole one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ..data.batches import Batches, as_batches, collated, is_pair
from ..data.image_folder import ImageBatches, ImageData, open_images
from ..data.one_batch import Batch, arguments_in, images_in
from ..errors import DataError
from ..training.seeding import mixed_seed, seed_step

Args = tuple[Any, ...]
Epoch = Callable[[int, int], Iterator[Args]]

MOST_HELD = 256
"""So many images are held back at most."""


@dataclass(frozen=True)
class Compared:
    """Batches that a run is measured on, in memory unless they are the caller's own.

    origin: where they come from, as a report says it. classes: how many the labels tell apart, if known.
    """

    batches: Iterable[Batch] = ()
    origin: str = ""
    classes: int | None = None


@dataclass(frozen=True)
class Stream:
    """Batches of forward's arguments, without end.

    epoch: gives one pass over the data in an order of its own (epoch's number, first batch). batches: how many a
    pass has, None where only iterating tells. images: how many the data holds, those held back included, if known.
    held: batches that no pass gives. bad: images that could not be read so far.
    """

    seed: int
    epoch: Epoch
    batches: int | None = None
    images: int | None = None
    held: Callable[[], Iterator[Args]] = field(default=lambda: iter(()))
    bad: Sequence[str] = ()

    def compared(self, most: int) -> Compared:
        """What is held back; where that is nothing, the first batches, at most so many."""
        seed_step(self.seed, -1)
        held: list[Batch] = [(args, None) for args in self.held()]
        if held:
            return Compared(held, "held back")
        count = 0
        for args in itertools.islice(self.epoch(0, 0), most):
            held.append((args, None))
            count += images_in(args)
            if count >= MOST_HELD:
                break
        return Compared(held, "that are trained on as well")

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


def held_of(count: int) -> int:
    """How many of so many images are held back: a quarter of a few, a tenth of many."""
    return min(MOST_HELD, max(count // 10, min(32, count // 4)))


def stream_of(
    data: Any,
    batch_size: int,
    seed: int,
    *,
    hold: bool = True,
    network: nn.Module | None = None,
    inputs: int | None = None,
) -> Stream:
    """Read `data` in random order, each image once per pass.

    hold: keep some of the images apart, `held_of` as many as there are, always the same ones by `seed`; of a list of
    two batches or more, the last tenth. Nothing is held back of what only iterating gives.

    data: a tensor `(N, *)`, a Dataset, a folder's path, `ImageData` or `ImageBatches` are shuffled anew for each
    pass, in batches of one size (the rest of a pass is left out; an `ImageBatches` keeps its own batch size). A
    DataLoader or another iterable of batches decides on its own order and is iterated again and again; a generator
    is read into memory.

    network: whose arguments a dict's keys name. inputs: how many it is known to be given; see `as_batches`.

    Raises OptionError for a batch size below 1, and DataError for data that `as_batches` does not take.
    """
    as_batches((), batch_size)  # its check of the batch size
    if isinstance(data, (str, os.PathLike)):
        data = open_images(data)
    if isinstance(data, ImageData):
        data = data.batches(batch_size=batch_size)
    if is_pair(data):
        data = TensorDataset(*data) if arguments_in(data, network, inputs) > 1 else data[0]
    if isinstance(data, Tensor) and data.dim() > 0:
        return _indexed(len(data), batch_size, seed, lambda parts: (data[part] for part in parts), hold=hold)
    if isinstance(data, ImageBatches):
        return replace(_indexed(len(data.data), data.batch_size, seed, _of_files(data), hold=hold), bad=data.bad)
    if isinstance(data, Dataset) and not isinstance(data, (IterableDataset, DataLoader)) and hasattr(data, "__len__"):
        samples: Dataset[Any] = data
        # No DataLoader: starting one takes a random number, at a step that depends on where a run was resumed.
        return _indexed(
            len(data),
            batch_size,
            seed,
            lambda parts: (collated([samples[i] for i in p]) for p in parts),
            hold=hold,
            network=network,
            inputs=inputs,
        )
    last: list[Any] = []
    if hold and isinstance(data, (list, tuple)) and len(data) > 1:
        apart = len(data) - max(1, len(data) // 10)
        data, last = data[:apart], list(data[apart:])
    batches = as_batches(data, batch_size, network=network, inputs=inputs)
    return Stream(
        seed,
        lambda number, first: (args for args, _ in batches),
        held=lambda: (
            (args for args, _ in as_batches(last, batch_size, network=network, inputs=inputs)) if last else iter(())
        ),
    )


def _indexed(
    count: int,
    batch_size: int,
    seed: int,
    read: Callable[[list[list[int]]], Iterator[Any]],
    *,
    hold: bool,
    network: nn.Module | None = None,
    inputs: int | None = None,
) -> Stream:
    """A stream over data that can be read in any order: `read` gives the batches of the given indices."""
    if count == 0:
        raise DataError("data holds no image")
    mixed = torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
    held = held_of(count) if hold else 0
    apart, kept = mixed[:held], sorted(mixed[held:])
    size = min(batch_size, len(kept))

    def given(parts: list[list[int]]) -> Iterator[Args]:
        return (args for args, _ in Batches(_once(read(parts)), network=network, inputs=inputs)) if parts else iter(())

    def epoch(number: int, first: int) -> Iterator[Args]:
        generator = torch.Generator().manual_seed(mixed_seed(seed, plus=number))
        order = [kept[i] for i in torch.randperm(len(kept), generator=generator).tolist()]
        return given([order[i : i + size] for i in range(0, len(kept) - size + 1, size)][first:])

    held_parts = [apart[i : i + size] for i in range(0, held, size)]
    return Stream(seed, epoch, len(kept) // size, count, lambda: given(held_parts))


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
