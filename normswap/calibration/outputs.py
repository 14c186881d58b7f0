"""Outputs of the original and of the network before and after its repair, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..comparison.before_after import before_after
from ..comparison.outputs import OutputTally
from ..data.one_batch import images_in
from .images import leading
from .matching import forward
from .moments import Args

COMPARED = 16
"""Without labels, how many images the output drift is measured on."""


class Comparison:
    """Outputs of the original and of the network before and after, on the first images, or on all with labels.

    batches: those to compare on, the last of which may be a part of its own.
    classes: the names that the labels count, if known. notes: what could not be compared, once there is a summary.
    """

    def __init__(
        self,
        batches: Sequence[Args],
        labels: Sequence[Tensor | None],
        classes: tuple[str, ...] | None,
        with_original: bool,
    ) -> None:
        self.labelled = with_original and all(y is not None for y in labels)
        self.enabled = with_original
        self.classes = classes
        self.batches = list(batches) if self.labelled else leading(batches, COMPARED)
        self.labels = labels if self.labelled else [None] * len(self.batches)
        self.sizes = [images_in(args) for args in batches[: len(self.batches)]]
        self.outputs: dict[str, list[Any]] = {k: [None] * len(self.batches) for k in ("original", "before", "after")}
        self.notes: tuple[str, ...] = ()

    def keep(self, which: str, i: int, out: Any) -> None:
        """An output on the whole of batch i."""
        if i < len(self.batches):
            wanted = images_in(self.batches[i])
            self.outputs[which][i] = out if self.labelled else _rows(out, self.sizes[i], wanted)

    def run(self, which: str, model: nn.Module) -> None:
        """Compute the outputs that no pass has given."""
        if self.enabled:
            for i, args in enumerate(self.batches):
                if self.outputs[which][i] is None:
                    self.outputs[which][i] = forward(model, args)

    def summary(self) -> dict[str, Any]:
        """Keyword arguments for the report."""
        if not self.enabled:
            return {}
        tallies = [OutputTally(None if self.classes is None else len(self.classes), True) for _ in ("before", "after")]
        for which, tally in zip(("before", "after"), tallies, strict=True):
            for one, other, y in zip(self.outputs["original"], self.outputs[which], self.labels, strict=True):
                tally.add(one, other, y)
        self.notes = tuple(tallies[1].notes)
        return {"compared": sum(map(images_in, self.batches)), **before_after(*tallies)}


def _rows(out: Any, size: int, wanted: int) -> Any:
    """A copy of the first rows of an output on `size` images; None if not all of its tensors count images."""
    leaves, structure = pytree.tree_flatten(out)
    if not all(isinstance(t, Tensor) and t.dim() > 0 and len(t) == size for t in leaves):
        return None
    return pytree.tree_unflatten([t[:wanted].clone() for t in leaves], structure)
