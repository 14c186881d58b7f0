"""How near a network is to its original on images kept apart, and the nearest state that a run has come by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..comparison.outputs import OutputTally, floating
from ..data.batches import images_in
from ..errors import DataError
from ..modules.restore import is_detector
from ..training.losses import loss_of
from ..training.seeding import seed_step
from ..training.snapshot import Snapshot
from .outputs import outputs_of, run
from .settings import Settings
from .stream import Args, Compared

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

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        settings: Settings,
        compared: Compared,
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        self.model, self.reference, self.settings, self.compared = model, reference, settings, compared
        self._nearest = Snapshot(lambda: parameters, "cpu")
        self._outputs = outputs_of(reference), outputs_of(model)
        self._boxes = is_detector(model)
        self.images = 0
        self.looks: list[tuple[int, float]] = []

    def begin(self) -> None:
        """Measure the network as it was given; it counts as any later state does."""
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
        settings, tally, total, count = self.settings, OutputTally(self.compared.classes, True), 0.0, 0
        seed_step(settings.seed, -1)
        for args, labels in self.compared.batches:
            wanted, given = (
                run(out, net, args) for out, net in zip(self._outputs, (self.reference, self.model), strict=True)
            )
            check_finite(args, wanted)
            size = images_in(args)
            total += size * float(loss_of(wanted, given, settings.temperature, settings.loss, learning=False))
            count += size
            if not self._boxes:
                tally.add(wanted, given, labels)
            elif own:
                a, b = (run(network, network, args) for network in (self.reference, self.model))
                tally.add(a, b, labels)
        self.images = count
        self.looks.append((step, total / count))
        return Look(step, total / count, tally)


def check_finite(args: Args, wanted: Any) -> None:
    """Raise DataError where it is the image, or the original network, that is to blame."""
    for what, tree in (("a batch of the data", args), ("the original network's output", wanted)):
        if any(not bool(t.isfinite().all()) for t in floating(tree).values()):
            raise DataError(f"{what} holds NaN or Inf")
