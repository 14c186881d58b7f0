"""What `distil` tells: while it runs, when it ends, when it is interrupted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from ..comparison.before_after import BeforeAfter
from ..display.overview import ReportInNotebook
from ..display.progress import shown


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
class DistillationReport(BeforeAfter, ReportInNotebook):
    """The result of `distil`.

    steps: how many were done, of `planned`; kept: the step whose state the network has, 0 for the one it came in.
    images: how many different ones the data holds, None if only iterating tells. loss_first, loss_last: of the batches
    trained on, mean over the first and the last tenth of the steps; what is left of `features` counts in it.
    The other figures are over `compared` images, `compared_on` says which, of the network as it came and as it is.
    eval_loss: what a run lowers, without `features`. For drift, agreement and accuracy see `BeforeAfter`.
    bad: images that could not be read and were left out. losses, eval_losses: (step, loss), the former as means over
    a hundredth of the steps, the latter as it was measured on the way; of a resumed run, since then.
    """

    steps: int
    planned: int
    images: int | None
    loss_first: float | None
    loss_last: float | None
    compared_on: str = ""
    kept: int = 0
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    interrupted: bool = False
    resumed_at: int = 0
    notes: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    losses: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    eval_losses: tuple[tuple[int, float], ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, which a loss that is not finite is none of."""
        measured = [look for look in self.eval_losses if math.isfinite(look[1])]
        return {**asdict(self), "notes": list(self.notes), "bad": list(self.bad), "eval_losses": measured}

    def figures(self) -> list[tuple[str, str]]:
        """What to print: a name and its text. The scores' own error is left out: it may rise as the decisions near."""
        cut = " (interrupted)" if self.interrupted else ""
        kept = "" if self.kept == self.steps else f"; kept is the state of step {self.kept}"
        of = f" of {self.planned}" if self.interrupted else ""
        lines = [("distilled", f"{self.steps} step{'s' * (self.steps != 1)}{of}{cut}{kept}")]
        before, after = self.eval_loss_before, self.eval_loss_after
        if before is not None and after is not None:
            images = f"{self.compared} image{'s' * (self.compared != 1)} {self.compared_on}"
            lines.append(("loss", f"{before:.3g}, after {after:.3g}, on {images}"))
        before, after = self.agreement_before, self.agreement_after
        if before is not None and after is not None:
            lines.append(("agreement", f"{before:.4f}, after {after:.4f}"))
        elif self.drift_before is not None and self.drift_after is not None:
            lines.append(("output", f"relative error {self.drift_before:.3g}, after {self.drift_after:.3g}"))
        before, after = self.accuracy_before, self.accuracy_after
        if before is not None and after is not None:
            lines.append(("accuracy", f"{before:.4f}, after {after:.4f}; the original {self.accuracy_original:.4f}"))
        return lines

    def __str__(self) -> str:
        return "\n".join([*(f"{name}: {text}" for name, text in self.figures()), *self.notes])
