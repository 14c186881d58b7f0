"""The handwritten digits that come with the package; NOTICE.md beside this file says where they are from."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).with_name("digits.csv.gz")
TRAINING = 1_200
"""The first images are for training, the others held out. The file goes from writer to writer, so most of those who
wrote the held-out digits wrote none of the others."""


@dataclass(frozen=True)
class Digits:
    """images: float32 `(N, 1, 8, 8)` with the ink from 0 to 1; labels: int64 `(N,)`, from 0 to 9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | Tensor) -> Digits:
        return Digits(self.images[index], self.labels[index])


def load() -> Digits:
    """All 1,797 digits, in the order of the file: one a line, 64 pixels from 0 to 16 and the label."""
    with gzip.open(FILE, "rt") as lines:
        values = torch.tensor([[int(value) for value in line.split(",")] for line in lines])
    return Digits(values[:, :-1].reshape(-1, 1, 8, 8) / 16, values[:, -1])


def split() -> tuple[Digits, Digits]:
    """The digits to train on, and those held out."""
    digits = load()
    return digits[:TRAINING], digits[TRAINING:]
