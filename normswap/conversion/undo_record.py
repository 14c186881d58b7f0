"""What a conversion keeps so that it can be undone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.gains import gain_of

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
    """How to get the weight (or the gain of its weight norm, see `gain_of`) and bias of a folded layer back.

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
class Order:
    """How `calibrate` has put the channels of a layer or norm in another order than the original has.

    rows: of its output, `(C,)` int64, where each channel was before; columns: of its input, likewise. None where they
    stand as they were. All other records speak of the original's order.
    """

    path: str
    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass
class ParameterUndo:
    """A parameter that was changed where it is, by its name: its original, None where there was none, and the digest of
    what it became."""

    name: str
    value: Tensor | None
    given: Tensor


@dataclass
class Undo:
    """Everything `revert` needs. `complete` is False when it was not asked for, or did not survive."""

    norms: list[NormUndo] = field(default_factory=list)
    layers: list[LayerUndo] = field(default_factory=list)
    complete: bool = True
    orders: list[Order] = field(default_factory=list)
    parameters: list[ParameterUndo] = field(default_factory=list)


def ordered(tensor: Tensor, order: Order, *, back: bool = False) -> Tensor:
    """A layer's or norm's weight, bias, or anything of its shape, in an order, or back in the original's: a copy."""
    for dim, index in enumerate((order.rows, order.columns)):
        if index is not None and tensor.dim() > dim:
            index = index.to(tensor.device)
            tensor = tensor.index_select(dim, index.argsort() if back else index)
    return tensor


def in_first_order(layer: Any, order: Order | None) -> tuple[Tensor, Tensor | None]:
    """A layer's gain (its weight, see `gain_of`) and bias, with their channels as the original has them."""
    weight, bias = gain_of(layer).detach(), None if layer.bias is None else layer.bias.detach()
    if order is None:
        return weight, bias
    return ordered(weight, order, back=True), None if bias is None else ordered(bias, order, back=True)


@torch.no_grad()
def reorder(module: Any, order: Order, *, back: bool = False) -> None:
    """Put a module's channels in an order, or back, in place."""
    module = getattr(module, "norm", module)
    for parameter in (module.weight, module.bias):
        if parameter is not None:
            parameter.data.copy_(ordered(parameter.data, order, back=back))
