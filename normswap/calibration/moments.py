"""Per-channel mean and variance of everything that passed a place in the network, pooled exactly over batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..undo import wide

# Where E[x^2] is this many times the variance, float32 sums of squares lose too much; such channels are centred first.
_OFFSET = 25.0


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


@torch.no_grad()
def moments_of(x: Tensor, channel_dim: int = 1) -> Moments:
    """The moments of one tensor `(N, C, *)`, or with channels in another place, of any floating dtype.

    Sums run in at least float32 within an image and in float64 beyond it.
    """
    rows = wide(x.detach()).movedim(channel_dim, 1)
    rows = rows.flatten(2) if rows.dim() > 2 else rows.unsqueeze(-1)
    if rows.numel() == 0:
        return Moments()
    mean, deviation, squares = _sums(rows)
    offset = (squares > _OFFSET * deviation).nonzero().flatten()
    if len(offset):
        part = rows[:, offset]
        centre = mean[offset].to(part.dtype)
        shift, deviation[offset], _ = _sums(part - centre[:, None])
        mean[offset] = centre.double() + shift
    return Moments(rows.shape[0] * rows.shape[2], mean, deviation)


def _sums(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `(N, C, P)`: mean, sum of squared deviations and sum of squares, `(C,)` float64 each."""
    positions = rows.shape[2]
    means = rows.mean(-1).double()
    squares = torch.linalg.vector_norm(rows, dim=-1).double().square()
    mean = means.mean(0)
    within = (squares - positions * means.square()).clamp_min(0).sum(0)
    return mean, within + positions * (means - mean).square().sum(0), squares.sum(0)
