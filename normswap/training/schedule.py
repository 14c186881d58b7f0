"""The learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A linear rise to `rate` at step `peak`, then a cosine to `final` of it at step `end`. Steps count from 0.

    The rise matters: right after a conversion gradients are several times larger than later. A function of the step
    alone, so that a resumed run needs no state of it. Source: Smith and Topin 2018, "Super-convergence", with a cosine
    as in `torch.optim.lr_scheduler.OneCycleLR`.
    """

    rate: float
    peak: int
    end: int
    final: float = 0.0

    def at(self, step: int) -> float:
        """The learning rate of a step, from 0 to `end`."""
        if step < self.peak:
            return self.rate * ((step + 1) / (self.peak + 1))
        done = (step - self.peak) / max(1, self.end - self.peak)
        return self.rate * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))
