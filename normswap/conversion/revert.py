"""Undo a conversion, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Fix, RevertError, Text
from ..modules.fast_path import fit_fast_paths
from ..modules.hooks import hand_over_hooks
from ..modules.tree import aliases, module_at, replace_module
from ..modules.wrappers import check_wrapper, rewrapped, unwrapped
from .exact_scaling import layer_digest, restore_layer, undo_layer
from .joined import fused_after_training
from .parameter_edits import parameter
from .record import Record, attach, detach, record_of
from .stabilize import Sizes
from .undo_record import NormUndo, ParameterUndo, Undo, reorder


def revert(model: nn.Module, *, strict: bool = True) -> nn.Module:
    """Undo a conversion, in place: the network that `convert` was given, bit for bit. Returns its root.

    A network that was converted twice is as it was before the second time; another call undoes the first.

    strict=False accepts a network that was trained since: folded weights are then divided by what they were
    multiplied with, and the original norms put back, which is not the original network any more.

    Raises RevertError, before anything is changed, when the model was not converted, or exactness is lost.
    """
    check_wrapper(model)
    return rewrapped(model, reverted(unwrapped(model), strict=strict), inplace=True)


def reverted(model: nn.Module, *, strict: bool = True) -> nn.Module:
    """`revert`, for a network that nothing wraps."""
    record = record_of(model)
    if record is None:
        raise RevertError("this model was not made by normswap.convert or normswap.load; there is nothing to revert")
    undo: Undo = record.undo
    modules = _changed_modules(model, record)
    moved = [] if record.calibrated else [n.paths[0] for n in undo.norms if _norm_changed(modules[n.paths[0]], n)]
    orders = {order.path: order for order in undo.orders}
    originals = {layer.path: undo_layer(modules[layer.path], layer, orders.get(layer.path)) for layer in undo.layers}
    edited = [p.name for p in undo.parameters if not _as_given(model, p)]
    changed = [*(path for path, original in originals.items() if original is None), *moved, *edited]
    if changed and strict:
        raise _changed(changed)
    for path, order in orders.items():
        reorder(modules[path], order, back=True)
    for each in () if edited else undo.parameters:
        _restore_parameter(model, each)
    for layer in undo.layers:
        restore_layer(modules[layer.path], layer, originals[layer.path])
    kept = {step.path for step in record.plan.steps if edited and step.readers}  # whose gamma and beta stay with these
    for norm in undo.norms:
        now = modules[norm.paths[0]]
        _restore_tensors(norm, now)
        norm.module.training = now.training
        hand_over_hooks(norm.module, now)
        if norm.paths[0] in kept:
            _neutral(norm.module)
        model = replace_module(model, norm.paths, norm.module)
    fit_fast_paths(model, [norm.module for norm in undo.norms])
    detach(model)
    if record.previous is not None:
        attach(model, record.previous)
    return model


def _changed(paths: list[str]) -> RevertError:
    return RevertError(
        f"{len(paths)} layer{'s' * (len(paths) != 1)} changed since the conversion (trained?), the first is "
        f"{paths[0]}; the original network cannot be restored bit for bit",
        hint=Text(
            Fix("strict", False),
            " undoes the swap with the weights as they are now; ",
            'convert(to="bn") keeps what a sync, frozen or renorm norm has learned.',
        ),
    )


def _changed_modules(model: nn.Module, record: Record) -> dict[str, nn.Module]:
    """The modules of a network by all their names. Raises RevertError where its record does not suffice for them."""
    if record.note(Sizes) is not None:
        raise RevertError("the network is stabilized for training", hint="Revert it after `with stabilized(...)`.")
    if fused_after_training(record):
        raise RevertError(
            "the network was trained before it was fused, which cannot be undone; "
            "the file that it was fused from is the trained one",
            hint="Its original, before any conversion, can be built again from its source.",
        )
    if not record.undo.complete:
        raise RevertError(
            Text("the conversion kept nothing to undo it with (", Fix("undo", False), ")"),
            hint="Build the original network again from its source.",
        )
    modules = {name: module for module, names in aliases(model).items() for name in names}
    gone = [path for path in _paths_of(record.undo) if path not in modules]
    if gone:
        raise RevertError(
            f"the network no longer has all layers that were changed; the first of {len(gone)} is {gone[0]}",
            hint="Build the original network again from its source.",
        )
    return modules


def _as_given(model: nn.Module, undo: ParameterUndo) -> bool:
    return torch.equal(layer_digest(parameter(model, undo.name)), undo.given.cpu())


@torch.no_grad()
def _neutral(norm: Any) -> None:
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        if (tensor := getattr(norm, name, None)) is not None:
            tensor.fill_(value)


def _restore_parameter(model: nn.Module, undo: ParameterUndo) -> None:
    now = parameter(model, undo.name)
    if undo.value is None:
        owner, _, leaf = undo.name.rpartition(".")
        module_at(model, owner)._parameters[leaf] = None
    elif now is not None:
        now.data.copy_(undo.value)


def _paths_of(undo: Undo) -> list[str]:
    changed = [*(layer.path for layer in undo.layers), *(order.path for order in undo.orders)]
    changed += [each.name.rpartition(".")[0] for each in undo.parameters]
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
