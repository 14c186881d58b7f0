"""What `distil` tells: while it runs, when it ends, when it is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from ..agreement import comparison_lines
from ..overview import ReportInNotebook
from ..progress import shown


@dataclass(frozen=True)
class Progress:
    """One step, as `progress=` is told of it.

    step: 1 to steps. loss: of this step's batch, before the update. agreement: share of the batch that both networks
    decide alike, None where the outputs are no class scores. lr: the relative learning rate (see `distil`).
    """

    step: int
    steps: int
    loss: float
    agreement: float | None
    lr: float

    def figures(self) -> str:
        """`loss 0.53, agreement 0.98`."""
        agreement = "" if self.agreement is None else f", agreement {self.agreement:.3f}"
        return f"loss {self.loss:.3g}{agreement}"


@contextmanager
def told(progress: Callable[[Progress], None] | bool | None) -> Iterator[Callable[[Progress], None] | None]:
    """What a run tells: the caller's function, or a line of its own (see `progress.shown`)."""
    if callable(progress):
        yield progress
        return
    with shown(progress, "distilling") as line:
        yield None if line is None else lambda now: line(now.step, now.steps, now.figures())


@dataclass(frozen=True)
class DistillationReport(ReportInNotebook):
    """The result of `distil`.

    steps: how many were done, of `planned`; images: how many different ones the data holds, None if only iterating
    tells. loss_first, loss_last: mean over the first and the last tenth of the steps. drift, agreement before and
    after: relative error `|out - original| / |original|` of the output, and share of images decided alike, over
    `compared` images; None where outputs do not compare so. accuracy: where `eval_data` came with labels.
    bad: images that could not be read.
    """

    steps: int
    planned: int
    images: int | None
    loss_first: float | None
    loss_last: float | None
    compared: int = 0
    drift_before: float | None = None
    drift_after: float | None = None
    agreement_before: float | None = None
    agreement_after: float | None = None
    accuracy_original: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    interrupted: bool = False
    resumed_at: int = 0
    notes: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "notes": list(self.notes), "bad": list(self.bad)}

    def __str__(self) -> str:
        done = f"{self.steps} step{'s' * (self.steps != 1)}"
        lines = [f"distilled for {done}" + (f" of {self.planned} (interrupted)" if self.interrupted else "")]
        if self.loss_first is not None and self.loss_last is not None:
            lines.append(f"loss: {self.loss_first:.3g} -> {self.loss_last:.3g}")
        return "\n".join([*lines, *comparison_lines(self), *self.notes])
