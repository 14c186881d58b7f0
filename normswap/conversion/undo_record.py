"""What a conversion keeps so that it can be undone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .exact_scaling import by_output_channel, folded_bias, packed_size, same_bits, scaled, unfold

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


@torch.no_grad()
def undo_layer(layer: Any, record: LayerUndo) -> tuple[Tensor, Tensor | None] | None:
    """The layer's original weight and bias; None when it was changed since it was folded.

    Folding the recovered weight again must give the layer's present weight to the bit, which tells a trained layer
    from an untouched one without having kept a checksum.
    """
    device = layer.weight.device
    scale, shift = record.scale.to(device), record.shift.to(device)
    bias = None if record.bias is None else record.bias.to(device)
    factor = by_output_channel(layer, scale)
    if record.weight is not None:
        weight = record.weight.to(device)
    elif record.correction is not None and packed_size(layer.weight) == record.correction.numel():
        weight = unfold(record.correction.to(device), layer.weight.detach(), factor)
    else:
        return None
    if record.given is not None:
        return (weight, bias) if torch.equal(layer_digest(layer), record.given.cpu()) else None
    again = folded_bias(bias, scale, shift, layer.weight.dtype)
    if not same_bits(scaled(weight, factor), layer.weight) or not same_bits(again, layer.bias):
        return None
    return weight, bias


def layer_digest(layer: Any) -> Tensor:
    """The SHA-256 of a layer's weight and bias, `(32,)` uint8."""
    made = hashlib.sha256()
    for tensor in (layer.weight, layer.bias):
        made.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(made.digest()), dtype=torch.uint8)
