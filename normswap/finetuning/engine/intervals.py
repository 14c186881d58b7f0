"""When a run keeps its state between two epochs."""

from __future__ import annotations

import time

from ..settings import Every
from .accelerator import Processes


class Due:
    """Whether the state is to be kept after a step. Clocks differ, so processes agree on it, at every `look` steps.

    It changes when the state is written, never what is learnt.
    """

    def __init__(self, every: int | str | None, processes: Processes, look: int) -> None:
        self._every, self._processes, self._look = Every.of(every), processes, look
        self.done()

    def done(self) -> None:
        """It was kept just now."""
        self._last = time.monotonic()

    def __call__(self, step: int) -> bool:
        if self._every.steps is not None:
            return step > 0 and step % self._every.steps == 0
        if self._every.seconds is None:
            return False
        late = time.monotonic() - self._last >= self._every.seconds
        if not self._processes.together:
            return late
        return step % self._look == 0 and self._processes.largest(int(late)) > 0
