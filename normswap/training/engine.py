"""The loop under every training: steps, measurements, checkpoints. It knows nothing of what is learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from .updates import Updates


class Lesson(Protocol):
    """What is learnt, and what becomes of it.

    All that is random in a step depends on the run's seed and the step, and what is due on the settings and the step
    alone: so a run that was stopped anywhere goes on as if it had not been.
    """

    def passes(self, step: int) -> Sequence[Callable[[], Tensor]]:
        """Forward passes, each of which gives a loss; a step takes their mean gradient. Asked for step after step."""

    def stepped(self, loss: Tensor) -> None:
        """A step is done; its loss is of before the update."""

    def due(self, step: int) -> bool:
        """Whether the network is to be measured after so many steps."""

    def measure(self, step: int) -> bool:
        """Measure it, and keep it if it is the best so far. False where the end of the run cut that short."""

    def keeps(self, step: int) -> bool:
        """Whether the state is to be kept after so many steps, so that a run can go on from it."""

    def keep(self) -> None:
        """Keep the state."""

    def tell(self) -> None:
        """Tell where the run stands."""

    def stopping(self) -> bool:
        """Whether the run is to end early; asked between steps."""

    def failed(self, error: Exception, where: str) -> None:
        """Leave the network whole after an error; raise a better one where there is one."""


class Engine:
    """Does the steps of a lesson that are left. measured: the step of the last measurement, None before the first."""

    def __init__(self, lesson: Lesson, updates: Updates, steps: int) -> None:
        self._lesson, self.updates, self.steps = lesson, updates, steps
        self.measured: int | None = None
        self._where = ""

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.updates.step

    @property
    def pending(self) -> bool:
        """Whether the network as it is has still to be measured."""
        return self.measured != self.step and self._lesson.due(self.step)

    def run(self) -> None:
        """Raises what a step raises, or what the lesson has to say of it."""
        lesson = self._lesson
        try:
            if self.pending:  # the start, or what this run goes on from was stopped between a step and its measurement
                self._stand()
            while self.step < self.steps and not lesson.stopping():
                self._where = f"step {self.step + 1}"
                lesson.stepped(self.updates.advance(lesson.passes(self.step)))
                self._stand()
                lesson.tell()
            if self.step < self.steps or self.pending:
                lesson.keep()
        except Exception as error:
            lesson.failed(error, self._where)
            raise

    def _stand(self) -> None:
        """Measure and keep, each if it is due; a measurement that is cut short ends the run, which keeps it then."""
        if self.pending:
            self._where = "validation"
            if not self._lesson.measure(self.step):
                return
            self.measured = self.step
        if self._lesson.keeps(self.step):
            self._lesson.keep()
