"""What a plan knows of sequences: which norms take statistics over time, and whether they can leave padding out."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import nn

from ..data.one_batch import Forward, named_lengths, named_mask
from ..inspection.example_inputs import inputs_for
from ..inspection.inventory import Inventory
from ..modules.tree import module_at
from ..norms._padded import PADDED
from ..norms.registry import norm_named
from ..norms.spec import NormSpec, Options
from ..tracing.padding import Padding
from .plan import Step


class Sequences:
    """The sequences of one network, from one run that is made when it is first asked for.

    recurrent: whether it has layers that show which tensors are sequences. lengths, masks: whether its forward is given
    such, by the names of its arguments, since sequences differ in length.
    """

    def __init__(self, model: nn.Module, inventory: Inventory, example_inputs: Any) -> None:
        self.model, self.inventory, self.example_inputs = model, inventory, example_inputs
        self.recurrent = any(isinstance(m, nn.RNNBase) for m in nn.Module.modules(model))
        arguments = [parameter.name for parameter in Forward.of(model).parameters]
        self.lengths, self.masks = any(map(named_lengths, arguments)), any(map(named_mask, arguments))

    @cached_property
    def _seen(self) -> Padding | None:
        inputs = inputs_for(self.model, self.example_inputs)
        if inputs is None:
            return None
        norms = {module_at(self.model, layer.path): layer.path for layer in self.inventory.layers}
        try:
            return Padding(self.model, inputs, norms)
        except Exception:  # whatever the model's forward raises on inputs it was not made for
            return None

    def tells_padding(self, path: str, channels: int, target: NormSpec, options: Options) -> bool:
        """Whether the norm that comes to a path takes statistics over time, from steps whose padding is known."""
        if not self.recurrent or not over_positions(target, channels, options):
            return False
        if isinstance(module_at(self.model, path), PADDED):
            return True
        seen = self._seen
        return seen is not None and path in seen.sequences and seen.padded[path]

    def counts_padding(self, step: Step) -> bool:
        """Whether what comes to a step's path takes statistics over time, of sequences, padding included.

        In a network that packs sequences or is given lengths, which thus differ, all of `(N, C, *)` are such; of one
        that is given a mask, all of `(N, C, T)`; in others, what a recurrent layer has made. Where no run shows
        anything, 1d norms.
        """
        if not (self.recurrent or self.lengths or self.masks) or step.padded:
            return False
        if not over_positions(norm_named(step.target), step.channels, step.options):
            return False
        if self._seen is None:
            return step.dims in (1, None)
        differ = self._seen.wide if self._seen.packs or self.lengths else self._seen.thin if self.masks else set()
        return step.path in self._seen.sequences or step.path in differ


def over_positions(target: NormSpec, channels: int, options: Options) -> bool:
    """Whether a norm's statistics are those of several positions."""
    count = target.elements
    return count is not None and count(channels, 2, options) > count(channels, 1, options)
