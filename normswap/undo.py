"""What a conversion keeps so that it can be undone bit for bit, and undoing it.

A folded weight `W' = round(W * s)` does not determine `W`: `round(W' / s)` may be one unit in the last place off. Two
bits per weight say which way, so an exact undo costs a sixteenth of the folded float32 weights instead of a copy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import Fix, RevertError, Text
from .records import ATTRIBUTE, put_record
from .surgery import aliases, check_module, hand_over_hooks, replace
from .wrappers import check_wrapper, rewrapped, unwrapped

_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
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
class Order:
    """How `calibrate` has put the channels of a layer or norm in another order than the original has.

    rows: of its output, `(C,)` int64, where each channel was before; columns: of its input, likewise. None where they
    stand as they were. All other records speak of the original's order.
    """

    path: str
    rows: Tensor | None = None
    columns: Tensor | None = None


@dataclass
class Undo:
    """Everything `revert` needs. `complete` is False when it was not asked for, or did not survive."""

    norms: list[NormUndo] = field(default_factory=list)
    layers: list[LayerUndo] = field(default_factory=list)
    complete: bool = True
    orders: list[Order] = field(default_factory=list)


def by_output_channel(layer: Any, vector: Tensor) -> Tensor:
    """View `(C,)` so that it broadcasts over the weight of a convolution, transposed convolution or linear layer."""
    weight = layer.weight
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        # (in, out / groups, *k): input channels are ordered by group, and so are the output channels they make.
        per_input = vector.view(layer.groups, 1, -1).expand(layer.groups, weight.shape[0] // layer.groups, -1)
        return per_input.reshape(weight.shape[0], -1, *([1] * (weight.dim() - 2)))
    return vector.view(-1, *([1] * (weight.dim() - 1)))


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def scaled(weight: Tensor, factor: Tensor) -> Tensor:
    """`weight * factor` rounded to the weight's dtype, computed in at least float32."""
    return (wide(weight) * factor).to(weight.dtype)


def _unscaled(weight: Tensor, factor: Tensor) -> Tensor:
    return (wide(weight) / factor).to(weight.dtype)


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
        code = part.view(integer).sub(_unscaled(folded, by).view(integer)).add_(1)
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
    return (_unscaled(folded, factor).view(integer) + codes.to(integer) - 1).view(folded.dtype)


def _packed(codes: Tensor) -> Tensor:
    """Four codes a byte: the quarters of the flat codes side by side, which vectorises."""
    flat = codes.reshape(-1)
    if missing := -flat.numel() % 4:
        flat = nn.functional.pad(flat, (0, missing))
    a, b, c, d = flat.view(4, -1)
    return a | b << 2 | c << 4 | d << 6


def _packed_size(weight: Tensor) -> int:
    return -(-weight.numel() // 4)


def ordered(tensor: Tensor, order: Order, *, back: bool = False) -> Tensor:
    """A layer's or norm's weight, bias, or anything of its shape, in an order, or back in the original's: a copy."""
    for dim, index in enumerate((order.rows, order.columns)):
        if index is not None and tensor.dim() > dim:
            index = index.to(tensor.device)
            tensor = tensor.index_select(dim, index.argsort() if back else index)
    return tensor


@torch.no_grad()
def reorder(module: Any, order: Order, *, back: bool = False) -> None:
    """Put a module's channels in an order, or back, in place."""
    module = getattr(module, "norm", module)
    for parameter in (module.weight, module.bias):
        if parameter is not None:
            parameter.data.copy_(ordered(parameter.data, order, back=back))


@torch.no_grad()
def undo_layer(layer: Any, record: LayerUndo, order: Order | None = None) -> tuple[Tensor, Tensor | None] | None:
    """The layer's original weight and bias; None when it was changed since it was folded.

    Folding the recovered weight again must give the layer's present weight to the bit, which tells a trained layer
    from an untouched one without having kept a checksum. order: the one that the layer stands in now.
    """
    device = layer.weight.device
    scale, shift = record.scale.to(device), record.shift.to(device)
    bias = None if record.bias is None else record.bias.to(device)
    factor = by_output_channel(layer, scale)
    now, bias_now = in_first_order(layer, order)
    if record.weight is not None:
        weight = record.weight.to(device)
    elif record.correction is not None and _packed_size(now) == record.correction.numel():
        weight = unfold(record.correction.to(device), now, factor)
    else:
        return None
    if record.given is not None:
        return (weight, bias) if torch.equal(digest(now, bias_now), record.given.cpu()) else None
    again = folded_bias(bias, scale, shift, now.dtype)
    if not _same_bits(scaled(weight, factor), now) or not _same_bits(again, bias_now):
        return None
    return weight, bias


def in_first_order(layer: Any, order: Order | None) -> tuple[Tensor, Tensor | None]:
    """A layer's weight and bias, with their channels as the original has them."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if order is None:
        return weight, bias
    return ordered(weight, order, back=True), None if bias is None else ordered(bias, order, back=True)


def digest(*tensors: Tensor | None) -> Tensor:
    """The SHA-256 of a layer's weight and bias, `(32,)` uint8."""
    made = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            made.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(made.digest()), dtype=torch.uint8)


def _same_bits(a: Tensor, b: Tensor | None) -> bool:
    """Equal in shape, dtype and every bit, so that NaN equals itself."""
    if b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = _INTEGER[a.element_size()]
    return torch.equal(a, b) or torch.equal(a.view(integer), b.view(integer))


def folded_bias(bias: Tensor | None, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """`b' = b * scale + shift`, `(C,)`, in the layer's dtype."""
    return shift.to(dtype) if bias is None else (wide(bias) * scale + shift).to(dtype)


def revert(model: nn.Module, *, strict: bool = True) -> nn.Module:
    """Undo a conversion, in place: the network that `convert` was given, bit for bit. Returns its root.

    A network that was converted twice is as it was before the second time; another call undoes the first.

    strict=False accepts a network that was trained since: folded weights are then divided by what they were
    multiplied with, and the original norms put back, which is not the original network any more.

    Raises RevertError, before anything is changed, when the model was not converted, or exactness is lost.
    """
    check_module(model)
    check_wrapper(model)
    wrapper, model = model, unwrapped(model)
    record = model.__dict__.get(ATTRIBUTE)
    if record is None:
        raise RevertError("this model was not made by normswap.convert or normswap.load; there is nothing to revert")
    undo: Undo = record.undo
    if record.factors:
        raise RevertError("the network is stabilized for training", hint="Revert it after `with stabilized(...)`.")
    if not undo.complete:
        raise RevertError(
            Text("the conversion kept nothing to undo it with (", Fix("undo", False), ")"),
            hint="Build the original network again from its source.",
        )
    modules = {name: module for module, names in aliases(model).items() for name in names}
    gone = [path for path in _paths_of(undo) if path not in modules]
    if gone:
        raise RevertError(
            f"the network no longer has all layers that were changed; the first of {len(gone)} is {gone[0]}",
            hint="Build the original network again from its source.",
        )
    orders = {order.path: order for order in undo.orders}
    originals = {layer.path: undo_layer(modules[layer.path], layer, orders.get(layer.path)) for layer in undo.layers}
    changed = [path for path, original in originals.items() if original is None]
    if not record.calibrated:
        changed += [n.paths[0] for n in undo.norms if _norm_changed(modules[n.paths[0]], n)]
    if changed and strict:
        raise RevertError(
            f"{len(changed)} layer{'s' * (len(changed) != 1)} changed since the conversion (trained?), the first is "
            f"{changed[0]}; the original network cannot be restored bit for bit",
            hint=Text(
                Fix("strict", False),
                " undoes the swap with the weights as they are now; ",
                'convert(to="bn") keeps what a sync, frozen or renorm norm has learned.',
            ),
        )
    for path, order in orders.items():
        reorder(modules[path], order, back=True)
    for layer in undo.layers:
        _restore_layer(modules[layer.path], layer, originals[layer.path])
    for norm in undo.norms:
        now = modules[norm.paths[0]]
        _restore_tensors(norm, now)
        norm.module.training = now.training
        hand_over_hooks(norm.module, now)
        model = replace(model, norm.paths, norm.module)
    put_record(model, record.previous)
    return rewrapped(wrapper, model, inplace=True)


def _paths_of(undo: Undo) -> list[str]:
    changed = [*(layer.path for layer in undo.layers), *(order.path for order in undo.orders)]
    return [*changed, *(path for norm in undo.norms for path in norm.paths)]


def _norm_changed(module: nn.Module, undo: NormUndo) -> bool:
    """Whether gamma, beta or statistics are not what the conversion gave the new norm."""
    module = getattr(module, "norm", module)
    return any(
        isinstance(now := getattr(module, name, None), Tensor)
        and (now.shape != then.shape or now.dtype != then.dtype or not torch.equal(now.detach(), then.to(now.device)))
        for name, then in undo.given.items()
    )


@torch.no_grad()
def _restore_layer(layer: Any, record: LayerUndo, original: tuple[Tensor, Tensor | None] | None) -> None:
    if original is None:
        scale, shift = record.scale.to(layer.weight.device), record.shift.to(layer.weight.device)
        bias = None if record.bias is None else ((wide(layer.bias) - shift) / scale).to(layer.bias.dtype)
        original = _unscaled(layer.weight, by_output_channel(layer, scale)), bias
    weight, old_bias = original
    layer.weight.data.copy_(weight)
    if old_bias is None:
        layer._parameters["bias"] = None
    else:
        layer.bias.data.copy_(old_bias)


@torch.no_grad()
def _restore_tensors(norm: NormUndo, now: nn.Module) -> None:
    """Put the kept values back into the original module, on the device and in the dtype of the network now."""
    tensors = [t for t in (*now.parameters(), *now.buffers()) if t.is_floating_point()]
    then = next((t.dtype for t in norm.given.values() if t.is_floating_point()), None)
    for name, tensor in norm.tensors.items():
        value = tensor.clone()
        if tensors:
            moved = tensors[0].dtype != then and value.is_floating_point()
            value = value.to(tensors[0].device, tensors[0].dtype if moved else value.dtype)
        held: Tensor | None = norm.module._parameters.get(name)
        if held is None:
            held = norm.module._buffers.get(name)
        if held is not None:
            held.data = value  # the same tensor object, which others may hold
    if callable(refresh := getattr(norm.module, "refresh", None)):
        refresh()
