"""Multiply weights so that the multiplication can be undone bit for bit.

A folded weight `W' = round(W * s)` does not determine `W`: `round(W' / s)` may be one unit in the last place off. Two
bits per weight say which way, so an exact undo costs a sixteenth of the folded float32 weights instead of a copy.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ..files.spilling import spilled, spilled_copy
from ..modules.gains import gain_name, gain_of, refresh
from ..modules.precision import at_least_float32
from .undo_record import LayerUndo, Order, in_first_order

_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def by_output_channel(layer: Any, vector: Tensor) -> Tensor:
    """View `(C,)` so that it broadcasts over the gain (the weight, see `gain_of`) of a convolution, transposed
    convolution or linear layer."""
    weight = gain_of(layer)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        # (in, out / groups, *k): input channels are ordered by group, and so are the output channels they make.
        per_input = vector.view(layer.groups, 1, -1).expand(layer.groups, weight.shape[0] // layer.groups, -1)
        return per_input.reshape(weight.shape[0], -1, *([1] * (weight.dim() - 2)))
    return vector.view(-1, *([1] * (weight.dim() - 1)))


def scaled(weight: Tensor, factor: Tensor) -> Tensor:
    """`weight * factor` rounded to the weight's dtype, computed in at least float32."""
    return (at_least_float32(weight) * factor).to(weight.dtype)


def unscaled(weight: Tensor, factor: Tensor) -> Tensor:
    return (at_least_float32(weight) / factor).to(weight.dtype)


_BLOCK = 1 << 16  # elements worked on at a time, so that what a block needs stays in the cache


@torch.no_grad()
def fold_exactly(weight: Tensor, factor: Tensor) -> Tensor | None:
    """Replace `weight` by `weight * factor` in place; return two bits per element that `unfold` undoes it with.

    Returns None, and leaves the weight as it was, where rounding goes further than one unit in the last place
    (underflow, overflow): then only a copy can undo it.
    """
    integer = _INTEGER[weight.element_size()]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    rows = max(1, _BLOCK * len(weight) // max(1, weight.numel()))
    for start in range(0, len(weight), rows):
        part, by = weight[start : start + rows], factor[start : start + rows]
        folded = scaled(part, by)
        code = part.view(integer).sub(unscaled(folded, by).view(integer)).add_(1)
        low, high = torch.aminmax(code)
        if low < 0 or high > 2:  # this block is as it was; those before it are exact to undo
            weight[:start] = _corrected(weight[:start], factor[:start], codes[:start])
            return None
        part.copy_(folded)
        codes[start : start + rows] = code
    return _packed(codes)


def unfold(packed: Tensor, folded: Tensor, factor: Tensor) -> Tensor:
    """The weight that `fold_exactly` was given, from what it returned and what it left."""
    quarters = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    return _corrected(folded, factor, quarters[: folded.numel()].view(folded.shape))


def _corrected(folded: Tensor, factor: Tensor, codes: Tensor) -> Tensor:
    integer = _INTEGER[folded.element_size()]
    return (unscaled(folded, factor).view(integer) + codes.to(integer) - 1).view(folded.dtype)


def _packed(codes: Tensor) -> Tensor:
    """Four codes a byte: the quarters of the flat codes side by side, which vectorises."""
    flat = codes.reshape(-1)
    if missing := -flat.numel() % 4:
        flat = nn.functional.pad(flat, (0, missing))
    a, b, c, d = flat.view(4, -1)
    return a | b << 2 | c << 4 | d << 6


def packed_size(weight: Tensor) -> int:
    return -(-weight.numel() // 4)


def same_bits(a: Tensor, b: Tensor | None) -> bool:
    """Equal in shape, dtype and every bit, so that NaN equals itself."""
    if b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = _INTEGER[a.element_size()]
    return torch.equal(a, b) or torch.equal(a.view(integer), b.view(integer))


def folded_bias(bias: Tensor | None, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """`b' = b * scale + shift`, `(C,)`, in the layer's dtype."""
    return shift.to(dtype) if bias is None else (at_least_float32(bias) * scale + shift).to(dtype)


# --- whole layers ---------------------------------------------------------------------------------------------------


def scale_layer(layer: Any, path: str, scale: Tensor, shift: Tensor, *, keep_undo: bool) -> LayerUndo | None:
    """Multiply the layer's output by `scale` and add `shift`, `(C,)` each, by changing its gain and bias in place."""
    factor = by_output_channel(layer, scale)
    weight, bias = gain_of(layer), layer.bias
    record = None
    if keep_undo and not weight.is_meta:
        old_bias = None if bias is None else bias.detach().clone()
        record = LayerUndo(path, scale, shift, old_bias, *fold_gain(layer, factor))
    elif weight.dtype == scale.dtype:
        weight.data.mul_(factor)
    else:
        weight.data.copy_(scaled(weight, factor))
    new_bias = folded_bias(bias, scale, shift, weight.dtype)
    if bias is None:  # a copy: `shift` stays in the undo record, and other layers may get it too
        layer._parameters["bias"] = nn.Parameter(new_bias.clone(), requires_grad=weight.requires_grad)
    else:
        bias.data.copy_(new_bias)
    refresh(layer)
    return record


def fold_gain(layer: nn.Module, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Multiply a layer's gain in place. Returns what gives it back: corrections of two bits, or a copy.

    Copied is what no corrections undo, and the g of a weight norm: it is small, and so few values might agree with the
    corrections by chance after a training, which nobody would notice then.
    """
    gain = gain_of(layer).data
    correction = fold_exactly(gain, factor) if gain_name(layer) == "weight" else None
    if correction is not None:
        return spilled(correction), None
    copy = spilled_copy(gain)
    gain.copy_(scaled(gain, factor))
    return None, copy


@torch.no_grad()
def undo_layer(layer: Any, record: LayerUndo, order: Order | None = None) -> tuple[Tensor, Tensor | None] | None:
    """The layer's original gain and bias; None when it was changed since it was folded.

    Folding the recovered weight again must give the layer's present weight to the bit, which tells a trained layer
    from an untouched one without having kept a checksum. order: the one that the layer stands in now.
    """
    device = gain_of(layer).device
    scale, shift = record.scale.to(device), record.shift.to(device)
    bias = None if record.bias is None else record.bias.to(device)
    factor = by_output_channel(layer, scale)
    now, bias_now = in_first_order(layer, order)
    if record.weight is not None:
        weight = record.weight.to(device)
    elif record.correction is not None and packed_size(now) == record.correction.numel():
        weight = unfold(record.correction.to(device), now, factor)
    else:
        return None
    if record.given is not None:
        return (weight, bias) if torch.equal(layer_digest(now, bias_now), record.given.cpu()) else None
    again = folded_bias(bias, scale, shift, now.dtype)
    if not same_bits(scaled(weight, factor), now) or not same_bits(again, bias_now):
        return None
    return weight, bias


def layer_digest(*tensors: Tensor | None) -> Tensor:
    """The SHA-256 of a layer's weight and bias, `(32,)` uint8."""
    made = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            made.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(made.digest()), dtype=torch.uint8)


@torch.no_grad()
def restore_layer(layer: Any, record: LayerUndo, original: tuple[Tensor, Tensor | None] | None) -> None:
    """Give a folded layer its original gain and bias; where it has none, what it has, divided by what was folded."""
    weight, old_bias = _divided(layer, record) if original is None else original
    gain_of(layer).data.copy_(weight)
    if old_bias is None:
        layer._parameters["bias"] = None
    else:
        layer.bias.data.copy_(old_bias)
    refresh(layer)


def _divided(layer: Any, record: LayerUndo) -> tuple[Tensor, Tensor | None]:
    weight = gain_of(layer)
    scale, shift = record.scale.to(weight.device), record.shift.to(weight.device)
    bias = None if record.bias is None else ((at_least_float32(layer.bias) - shift) / scale).to(layer.bias.dtype)
    return unscaled(weight, by_output_channel(layer, scale)), bias
