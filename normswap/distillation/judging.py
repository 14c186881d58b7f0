"""How near a network is to its original on images kept apart, and the nearest state that a run has come by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..comparison.outputs import OutputTally
from ..data.batches import run_on
from ..data.one_batch import images_in
from ..modules.restore import is_detector
from ..training.seeding import seed_step
from ..training.snapshot import Snapshot
from .stream import Args, Compared
from .target import FEWER, Answers, Target

LOOKS = 10
"""So many times a run is measured on its way, at its start and its end besides."""


@dataclass(frozen=True)
class Look:
    """What was measured at a step: mean loss over the images, without that of the norms inside, and the tally."""

    step: int
    loss: float
    tally: OutputTally

    def nearer(self, best: Look, first: Look) -> bool:
        """Whether this is to be kept in place of `best`: a smaller loss, and no fewer samples decided alike than at
        first, since the loss of a few sure mistakes can be outweighed by that of many images that were right already.
        """
        if math.isfinite(best.loss) and not self.loss < best.loss:
            return False
        agreement, least = self.tally.agreement(), first.tally.agreement()
        return math.isfinite(self.loss) and (agreement is None or least is None or agreement >= least)


class Judge:
    """Compares a model with its original on the same images, and holds the parameters that came nearest.

    first, best: what was measured of the network as it was given, and of the nearest so far, which may be the same.
    """

    first: Look
    best: Look

    def __init__(self, target: Target, compared: Compared, parameters: Mapping[str, nn.Parameter]) -> None:
        self.target, self.compared = target, compared
        self._nearest = Snapshot(lambda: parameters, "cpu")
        self._boxes = is_detector(target.model)
        self.images = 0
        self.looks: list[tuple[int, float]] = []

    def begin(self) -> None:
        """Measure the network as it was given, by what both networks give in one shape. It counts as any state."""
        known = None
        while known != self.target.compared:  # what one batch leaves out is left out of all
            known = self.target.compared
            self.looks.clear()
            self.first = self.best = self._look(0, own=True)
        self._nearest.take(0)

    def resume(self, step: int, kept: Mapping[str, Tensor]) -> None:
        """Take over the nearest state of another run, and measure it."""
        self._nearest.kept = dict(kept)
        if step:
            self.restore()
            self.best = self._look(step)

    def look(self, step: int) -> None:
        """Measure the network as it is at a step, and keep its parameters if they are the nearest so far."""
        found = self._look(step)
        if found.nearer(self.best, self.first):
            self.best = found
            self._nearest.take(step)

    def state(self) -> dict[str, Any]:
        """What `resume` takes."""
        return {"step": self.best.step, "kept": self._nearest.kept}

    def restore(self) -> None:
        """Give the network its nearest parameters."""
        self._nearest.put_back()

    def final(self) -> Look:
        """The nearest state, once it is in the network; a detector's boxes are compared only now."""
        return self._look(self.best.step, own=True) if self._boxes and self.best.step else self.best

    @torch.no_grad()
    def _look(self, step: int, *, own: bool = False) -> Look:
        """own: compare a detector's boxes too, which takes another pass."""
        tally, total, count = OutputTally(self.compared.classes, True), 0.0, 0
        for args, labels, answers in self._answers():
            if step == 0:
                self.target.leave_out(answers)
            loss = answers.inner if self.target.inside else self.target.outer(answers)
            if loss is not None:
                total, count = total + images_in(args) * float(loss), count + images_in(args)
            if not self.target.compares(answers):  # what is left says less than all that was measured at first
                total = math.inf
            if not self._boxes:
                tally.add(answers.wanted, answers.given, labels)
            elif own:
                a, b = (run_on(n, n, args, fewer=FEWER) for n in (self.target.reference, self.target.model))
                tally.add(a, b, labels)
        found = Look(step, total / count if count else math.inf, tally)
        self.images = count
        self.looks.append((step, found.loss))
        return found

    def _answers(self) -> Iterator[tuple[Args, Tensor | None, Answers]]:
        seed_step(self.target.settings.seed, -1)
        for args, labels in self.compared.batches:
            yield args, labels, self.target.run(args, inside=self.target.inside)
