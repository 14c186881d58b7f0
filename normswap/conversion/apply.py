"""Carry what a BN has learned into its replacement: fold, prescale, fuse, copy or reset one layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import PlanError
from ..modules.frozen_class import ATTRIBUTE, WANTED, hand_over
from ..modules.hooks import adopt
from ..modules.precision import at_least_float32
from ..modules.tree import device_and_dtype, module_at, replace_module
from ..norms._building import TAIL
from ..norms._wrappers import ChannelAffine, NormSequence
from ..norms.fused import scale_and_shift
from ..norms.registry import build, identify, norm_named
from ..norms.spec import NormState
from ..planning.plan import Plan, Step
from .exact_scaling import by_output_channel, fold_exactly, folded_bias, scaled
from .undo_record import TENSORS, LayerUndo, NormUndo, Undo

# What a norm of any type may hold that belongs to it, beside what its type names; all else was put there by its user.
_ATTRIBUTES = frozenset(("eps", "affine", "training", "parametrizations", ATTRIBUTE, WANTED))
_REGISTERED = frozenset((*TENSORS, *TAIL, "parametrizations"))


QUIET = 1e2
"""Channels whose variance is below so many `eps` leave the fold with a variance of their own below 0.99."""

FLOOR = 1e-3
"""Below this share of `eps`, what little variance was seen in training says nothing of what a channel may do."""


def standardization(state: NormState, *, unit: bool) -> tuple[Tensor, Tensor]:
    """`scale = 1 / sqrt(var + eps)` and `shift = -mean * scale`, each `(C,)`, in at least float32.

    unit: quiet channels are divided by `sqrt(var)` alone, which makes their variance 1 like all others'.
    """
    mean, var = state.statistics
    scale = torch.rsqrt(_divisor(state) if unit else at_least_float32(var) + state.eps)
    return scale, -at_least_float32(mean) * scale


def _divisor(state: NormState) -> Tensor:
    """The square of what the channels are divided by. A dead one keeps eps, so as not to drown others if it wakes."""
    var = at_least_float32(state.statistics[1])
    quiet = (var < QUIET * state.eps) & (var > FLOOR * state.eps)
    return torch.where(quiet, var, var + state.eps)


def gamma_factor(state: NormState | None, step: Step) -> Tensor | None:
    """What gamma is multiplied by, `(C,)` or a single number, so that the network stays the same; None for 1.

    `sqrt(1 + eps)` of a new norm's chosen eps, by which a channel of unit variance passes unchanged; and
    `sqrt(var / (var + eps))` of the old one's, which brings a quiet channel's output back to its size. Without the
    state the latter is not known, and taken for 1.
    """
    soft = math.sqrt(1 + (step.options.eps or 0.0))
    factor = torch.tensor(soft, dtype=torch.float64) if scales_gamma(step) else None
    if not step.unit or state is None:
        return factor
    var = at_least_float32(state.statistics[1])
    own = torch.sqrt(_divisor(state) / (var + state.eps))
    if var.is_meta or bool((own == 1).all()):
        return factor
    return own if factor is None else own * factor.to(own)


def read(model: nn.Module, step: Step) -> NormState:
    """The state of a step's norm as it is in `model` now."""
    module = module_at(model, step.path)
    spec = identify(module)
    if spec is None:
        raise PlanError("the plan does not fit this model:", [f"{step.path} is {type(module).__name__}, no norm"])
    return spec.read(module)


def state_before(norm: NormUndo) -> NormState:
    """The state of an original norm, with the values that were kept of it."""
    spec = identify(norm.module)
    if spec is None:
        raise TypeError(f"{type(norm.module).__name__} is no norm")
    kept: dict[str, Any] = dict(norm.tensors)
    return dataclasses.replace(spec.read(norm.module), **kept)


@torch.no_grad()
def apply(model: nn.Module, plan: Plan, *, keep_undo: bool, structure_only: bool = False) -> tuple[nn.Module, Undo]:
    """Carry out a plan in place. Returns the root (new if the root itself is a norm) and what undoes it.

    structure_only replaces the modules and adds the biases, without moving any values: for loading a state dict of
    the converted network into it afterwards.
    """
    undo = Undo(complete=keep_undo or structure_only)
    norms = [module_at(model, step.path) for step in plan.steps]
    # All copies are taken first: a gamma that two norms share is changed by the first one's step.
    copies = [_snapshot(norm) for norm in norms] if keep_undo else [{} for _ in norms]
    changed: set[int] = set()
    for step, old, before in zip(plan.steps, norms, copies, strict=True):
        if structure_only:
            _give_values(old)
        state = read(model, step)
        if structure_only:
            _add_biases(model, step)
        elif step.transfer in ("fold", "fuse"):
            fold = step.transfer == "fold"
            scale, shift = standardization(state, unit=step.unit) if fold else scale_and_shift(state)
            for producer in step.producers:
                record = scale_layer(module_at(model, producer), producer, scale, shift, keep_undo=keep_undo)
                if record is not None:
                    undo.layers.append(record)
        new = _replacement(model, step, old, state)
        _change_gamma(inner_norm(new), step, state, changed)
        hand_over(inner_norm(new), old, statistics=norm_named(step.target).updates_statistics)
        model = replace_module(model, (step.path, *step.aliases), new)
        if keep_undo:
            undo.norms.append(NormUndo((step.path, *step.aliases), old, before, _given(inner_norm(new), before)))
    return model, undo


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(module).items()}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A norm's tensors by name; straight from its tables, because `getattr` on a module is slow."""
    if parametrize.is_parametrized(module):
        return {name: t for name in TENSORS if (t := getattr(module, name, None)) is not None}
    tables = {**module._parameters, **module._buffers}
    return {name: t for name in TENSORS if (t := tables.get(name)) is not None}


def _given(norm: nn.Module, original: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the new norm holds; a tensor equal to the original's shares its copy."""
    now = _tensors(norm)
    return {name: original[name] if _equal(original.get(name), t) else t.detach().clone() for name, t in now.items()}


def _equal(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and not (a.is_meta or b.is_meta) and torch.equal(a, b)


def scale_layer(layer: Any, path: str, scale: Tensor, shift: Tensor, *, keep_undo: bool) -> LayerUndo | None:
    """Multiply the layer's output by `scale` and add `shift`, `(C,)` each, by changing its weight and bias in place."""
    factor = by_output_channel(layer, scale)
    weight, bias = layer.weight, layer.bias
    record = None
    if keep_undo and not weight.is_meta:
        old_bias = None if bias is None else bias.detach().clone()
        record = LayerUndo(path, scale, shift, old_bias, fold_exactly(weight.data, factor))
        if record.correction is None:
            record.weight = weight.detach().clone()
            weight.data.copy_(scaled(weight, factor))
    elif weight.dtype == scale.dtype:
        weight.data.mul_(factor)
    else:
        weight.data.copy_(scaled(weight, factor))
    new_bias = folded_bias(bias, scale, shift, weight.dtype)
    if bias is None:  # a copy: `shift` stays in the undo record, and other layers may get it too
        layer._parameters["bias"] = nn.Parameter(new_bias.clone(), requires_grad=weight.requires_grad)
    else:
        bias.data.copy_(new_bias)
    return record


def _give_values(norm: nn.Module) -> None:
    """Real zeros for a norm's parameters on the meta device; what is loaded later replaces them."""
    for name, parameter in norm._parameters.items():
        if parameter is not None and parameter.is_meta:
            norm._parameters[name] = nn.Parameter(torch.zeros(parameter.shape), parameter.requires_grad)


def _add_biases(model: nn.Module, step: Step) -> None:
    for producer in step.producers:
        layer: Any = module_at(model, producer)
        if layer.bias is None:
            empty = layer.weight.new_empty(step.channels)
            layer._parameters["bias"] = nn.Parameter(empty, requires_grad=layer.weight.requires_grad)


def _replacement(model: nn.Module, step: Step, old: nn.Module, state: NormState) -> nn.Module:
    """The module that takes the norm's place, with its tail, hooks and attributes."""
    state = dataclasses.replace(state, dims=state.dims or step.dims)
    if step.transfer == "reset":
        state = _reset(state)
    target = norm_named(step.target)
    if target.updates_statistics and not state.has_statistics:
        state = _with_fresh_statistics(model, state)
    standardize = None
    if step.transfer == "prescale":
        scale, shift = standardization(state, unit=step.unit)
        dtype = state.statistics[1].dtype
        standardize = ChannelAffine(scale.to(dtype), shift.to(dtype))
        standardize.training = state.training
    if step.transfer == "fuse":
        norm: Any = nn.Identity()
        norm.training = state.training
    else:
        norm = build(target, state, step.options)
        _keep_parametrizations(old, norm)
    new = norm
    if standardize is not None or state.tail:
        new = NormSequence(norm, standardize=standardize, tail=state.tail)
    was = identify(old)
    adopt(new, old, known=_ATTRIBUTES.union(was.attributes if was else ()))
    _adopt_registered(new, old, known=_REGISTERED.union(was.tensors if was else ()))
    return new


def inner_norm(module: nn.Module) -> Any:
    """The norm inside what `apply` put at a path."""
    return module.norm if isinstance(module, NormSequence) else module


def scales_gamma(step: Step) -> bool:
    """Whether gamma is scaled by sqrt(1 + eps), so that a channel of unit variance passes unchanged."""
    return step.transfer in ("fold", "prescale") and step.options.eps is not None


def _change_gamma(norm: Any, step: Step, state: NormState, changed: set[int]) -> None:
    """Scale or zero a gamma where the step asks for it; `changed` holds those that another norm's step has done."""
    weight = getattr(norm, "weight", None)
    if weight is not None and id(weight) in changed:
        return
    factor = gamma_factor(state, step)
    if factor is not None:
        if weight is None:
            weight = nn.Parameter(torch.full_like(state.statistics[1], float(factor)), requires_grad=False)
            norm._parameters["weight"], norm.affine = weight, True
        else:
            weight.data.copy_(at_least_float32(weight.data) * factor.to(at_least_float32(weight.data)))
    if step.zero_init and weight is not None:
        weight.data.zero_()
    changed.add(id(weight))


def _reset(state: NormState) -> NormState:
    def fresh(tensor: Tensor | None, value: float) -> nn.Parameter | None:
        if tensor is None:
            return None
        filled = torch.full_like(tensor, value).detach()
        return nn.Parameter(filled, requires_grad=tensor.requires_grad or not isinstance(tensor, nn.Parameter))

    return dataclasses.replace(
        state,
        weight=fresh(state.weight, 1.0),
        bias=fresh(state.bias, 0.0),
        running_mean=None,
        running_var=None,
        num_batches_tracked=None,
    )


def _with_fresh_statistics(model: nn.Module, state: NormState) -> NormState:
    weight = state.weight
    device, dtype = device_and_dtype(model) if weight is None else (weight.device, weight.dtype)
    zeros = torch.zeros(state.channels, device=device, dtype=dtype)
    count = torch.zeros((), dtype=torch.long, device=device)
    return dataclasses.replace(state, running_mean=zeros, running_var=torch.ones_like(zeros), num_batches_tracked=count)


def _keep_parametrizations(old: Any, norm: Any) -> None:
    """Register the old gamma's and beta's parametrizations (`torch.nn.utils.parametrize`) on the new ones."""
    if not parametrize.is_parametrized(old):
        return
    for name, chain in old.parametrizations.items():
        if isinstance(norm._parameters.get(name), nn.Parameter):
            for parametrization in chain:
                parametrize.register_parametrization(norm, name, parametrization, unsafe=True)
            for held in ("original", "original0", "original1"):
                if hasattr(chain, held):
                    setattr(norm.parametrizations[name], held, getattr(chain, held))


def _adopt_registered(new: nn.Module, old: nn.Module, *, known: frozenset[str]) -> None:
    """Parameters, buffers and children that the user registered on the old norm."""
    for table in ("_parameters", "_buffers", "_modules"):
        mine, theirs = new.__dict__[table], old.__dict__[table]
        for name, value in theirs.items():
            if name not in mine and name not in known:
                mine[name] = value
                if name in old._non_persistent_buffers_set:
                    new._non_persistent_buffers_set.add(name)
