"""What a conversion keeps so that it can be undone."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass
class NormUndo:
    """The original norm module of a step, with copies of its tensors (the new norm shares its parameters).

    given: what the new norm's tensors were right after the conversion, to tell whether they moved since.
    """

    paths: tuple[str, ...]
    module: nn.Module
    tensors: dict[str, Tensor]
    given: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class LayerUndo:
    """How to get the weight and bias of a folded layer back.

    scale, shift: what was applied per output channel, `(C,)`. correction: packed two-bit corrections (uint8), or
    None where `weight` holds the original whole (when rounding went further than one unit). bias: the original.
    given: a layer that was fitted anew is no longer its original scaled; its `digest` then, to tell whether it moved.
    """

    path: str
    scale: Tensor
    shift: Tensor
    bias: Tensor | None
    correction: Tensor | None = None
    weight: Tensor | None = None
    given: Tensor | None = None


@dataclass
class Undo:
    """Everything `revert` needs. `complete` is False when it was not asked for, or did not survive."""

    norms: list[NormUndo] = field(default_factory=list)
    layers: list[LayerUndo] = field(default_factory=list)
    complete: bool = True
