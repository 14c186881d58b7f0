"""Which network of a run is the best, and when none better is to be expected."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...errors import Fix, OptionError, Text
from ..settings import Settings
from .checkpointer import RunState


class Monitor:
    """name: the validation figure that decides, as `val_accuracy`. lower: whether less of it is better.

    usual: the figure of the task, for settings that name none.
    """

    def __init__(self, settings: Settings, usual: str) -> None:
        self.name = usual if settings.monitor is None else f"val_{settings.monitor}"
        self.lower = self.name == "val_loss"
        self._patience = settings.patience

    def judge(self, standing: RunState, step: int, figures: Mapping[str, float]) -> bool:
        """Note the figures of a validation. Whether the network is the best so far; what training began with counts.

        Of two with the same figure the one with the smaller loss is kept, but only a better figure starts the count of
        `patience` anew. A figure that is NaN is no better than any. Raises OptionError for a figure that this data and
        network do not give, as the mAP of masks.
        """
        value, loss = figures.get(self.name), figures.get("val_loss")
        if value is None:
            known = ", ".join(name.removeprefix("val_") for name in figures)
            raise OptionError(
                f"validation gives no {self.name.removeprefix('val_')}", hint=Text(Fix("monitor"), f" takes {known}.")
            )
        better = not math.isnan(value) and (standing.best is None or self._above(value, standing.best))
        standing.waited = 0 if better else standing.waited + 1
        least = standing.best_loss
        if better or (value == standing.best and loss is not None and least is not None and loss < least):
            standing.best, standing.best_at, standing.best_loss = value, step, loss
            return True
        return False

    def exhausted(self, standing: RunState) -> bool:
        """Whether so many validations in a row had no better figure that the run ends."""
        return self._patience is not None and standing.waited >= self._patience

    def _above(self, value: float, other: float) -> bool:
        return value < other if self.lower else value > other
