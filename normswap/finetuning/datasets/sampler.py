"""Which samples each process takes at each step: a function of seed and epoch alone, so that any run can go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...training.seeding import mixed_seed

Key = tuple[int, int]
"""(epoch, index): what a sample depends on, its random changes included."""


@dataclass
class ResumableBatchSampler:
    """The batches of one process; a batch sampler for `torch.utils.data.DataLoader`.

    Every epoch has an order of its own. A step takes the next `accumulate * processes * size` samples: the first
    `processes * size` form the first forward pass, of which each process takes its slice, and so on. So two processes
    of batch size 1 do the steps of one process of batch size 2. What is left at the end of an epoch is left out.
    """

    samples: int
    size: int
    seed: int
    accumulate: int = 1
    processes: int = 1
    rank: int = 0
    epoch: int = 0
    first: int = 0

    def start(self, epoch: int, first: int = 0) -> None:
        """Let the next iteration give that epoch, from its step `first` on."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        """Forward passes that are left of the epoch."""
        return (self.samples // (self.size * self.accumulate * self.processes) - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, passes = self.epoch, len(self)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, plus=epoch))
        order = torch.randperm(self.samples, generator=generator).tolist()
        width = self.size * self.processes
        begin = self.first * self.accumulate * width + self.rank * self.size
        for number in range(passes):
            at = begin + number * width
            yield [(epoch, index) for index in order[at : at + self.size]]


@dataclass(frozen=True)
class ValidationSampler:
    """Every sample once, shared out among the processes: none is counted twice, some processes may have one less."""

    samples: int
    size: int
    processes: int = 1
    rank: int = 0

    def __len__(self) -> int:
        return -(-len(range(self.rank, self.samples, self.processes)) // self.size)

    def __iter__(self) -> Iterator[list[Key]]:
        own = range(self.rank, self.samples, self.processes)
        for start in range(0, len(own), self.size):
            yield [(0, index) for index in own[start : start + self.size]]
