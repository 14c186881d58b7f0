"""Per-channel mean and variance of everything that passed a place in the network, pooled exactly over batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..modules.precision import at_least_float32

# Where E[x^2] is this many times the variance, float32 sums of squares lose too much; such channels are centred first.
_OFFSET = 25.0
_AT_ONCE = 16  # samples; a centred copy of all of them would double the memory

Args = tuple[Any, ...]
_NONE = torch.zeros(0, dtype=torch.float64)


@dataclass
class Moments:
    """Count, mean `(C,)` and sum of squared deviations `(C,)` in float64, merged by the rule of Chan et al. 1979.

    Pooling weighs every value alike, whichever batch, image or call it came with, so that the result depends on
    neither the batch size nor the order beyond rounding.
    """

    count: int = 0
    mean: Tensor = _NONE
    deviation: Tensor = _NONE

    @property
    def var(self) -> Tensor:
        """Population variance, `(C,)` float64."""
        return self.deviation / max(self.count, 1)

    @property
    def unbiased_var(self) -> Tensor:
        """Sample variance (divided by count - 1), `(C,)` float64, which is what torch keeps in `running_var`."""
        return self.deviation / max(self.count - 1, 1)

    @property
    def finite(self) -> bool:
        """Whether neither NaN nor infinity passed."""
        return bool(torch.isfinite(self.mean).all() & torch.isfinite(self.deviation).all())

    def add(self, other: Moments) -> None:
        """Pool with the moments of other values."""
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.deviation = other.count, other.mean, other.deviation
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.deviation = self.deviation + other.deviation + delta.square() * (self.count * other.count / total)
        self.count = total

    def mapped(self, scale: Tensor, shift: Tensor) -> Moments:
        """The moments of `scale * x + shift`, `(C,)` each."""
        return Moments(self.count, scale * self.mean + shift, scale.square() * self.deviation)


@dataclass(frozen=True)
class Rows:
    """Sums over the positions of each sample and channel: `values (N, C, P)`; `mean` and `square` `(N, C)` float64.

    mean: over positions; square: the mean of squares. Sums run in at least float32 within a sample.
    """

    values: Tensor
    mean: Tensor
    square: Tensor

    def moments(self) -> Moments:
        """Over all samples and positions, in float64."""
        samples, _, positions = self.values.shape
        if self.values.numel() == 0:
            return Moments()
        mean, deviation = self._pooled()
        offset = (self.square.sum(0) * positions > _OFFSET * deviation).nonzero().flatten()
        if len(offset):
            centre = mean[offset].to(self.values.dtype)
            parts = [_rows(part[:, offset] - centre[:, None]) for part in self.values.split(_AT_ONCE)]
            centred = Rows(self.values, torch.cat([p.mean for p in parts]), torch.cat([p.square for p in parts]))
            shift, deviation[offset] = centred._pooled()
            mean[offset] = centre.double() + shift
        return Moments(samples * positions, mean, deviation)

    def _pooled(self) -> tuple[Tensor, Tensor]:
        mean = self.mean.mean(0)
        within = (self.square - self.mean.square()).clamp_min(0)
        return mean, self.values.shape[2] * (within + (self.mean - mean).square()).sum(0)


@torch.no_grad()
def rows_of(x: Tensor, channel_dim: int = 1) -> Rows:
    """Of one tensor `(N, C, *)`, or with channels in another place, of any floating dtype."""
    values = at_least_float32(x.detach()).movedim(channel_dim, 1)
    return _rows(values.flatten(2) if values.dim() > 2 else values.unsqueeze(-1))


def _rows(values: Tensor) -> Rows:
    square = torch.linalg.vector_norm(values, dim=-1).double().square() / max(values.shape[2], 1)
    return Rows(values, values.mean(-1).double(), square)


def moments_of(x: Tensor, channel_dim: int = 1) -> Moments:
    """The moments of one tensor `(N, C, *)`, or with channels in another place, of any floating dtype."""
    return rows_of(x, channel_dim).moments()
