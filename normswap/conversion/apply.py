"""Carry what a BN has learned into its replacement: fold, prescale, fuse, copy or reset one layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..modules.fast_path import fit_fast_paths
from ..modules.frozen_class import ATTRIBUTE, WANTED, hand_over
from ..modules.gains import gain_of
from ..modules.hooks import adopt
from ..modules.precision import at_least_float32
from ..modules.tree import replace_module
from ..norms._building import TAIL
from ..norms._padded import PaddedSequence, padded
from ..norms._wrappers import NormSequence, wrapped
from ..norms.fused import scale_and_shift
from ..norms.registry import build, identify
from ..norms.spec import NormState
from ..planning.plan import Step, Transfer
from .bound import BoundPlan, BoundStep, inner_norm
from .exact_scaling import scale_layer
from .parameter_edits import add_parameters, edit
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


def folded_in(bound: BoundStep) -> tuple[Tensor, Tensor]:
    """What is multiplied into the outputs of the layers before a norm, and added to them, each `(C,)`."""
    if bound.step.transfer is Transfer.ABSORB:
        sign = signs(bound.state, gain_of(bound.producers[0]))
        return sign, torch.zeros_like(sign)
    if bound.step.transfer is Transfer.FOLD:
        return standardization(bound.state, unit=bound.step.unit)
    return scale_and_shift(bound.state)


def signs(state: NormState, like: Tensor) -> Tensor:
    """The signs of gamma, `(C,)` of 1 and -1: all of a norm without statistics that a layer can take in before any are
    known. like: a tensor of the dtype and device, where there is no gamma."""
    if state.weight is None:
        return at_least_float32(like.detach()).new_ones(state.channels)
    return torch.where(at_least_float32(state.weight.detach()) < 0, -1.0, 1.0)


def state_before(norm: NormUndo) -> NormState:
    """The state of an original norm, with the values that were kept of it."""
    spec = identify(norm.module)
    if spec is None:
        raise TypeError(f"{type(norm.module).__name__} is no norm")
    kept: dict[str, Any] = dict(norm.tensors)
    return dataclasses.replace(spec.read(norm.module), **kept)


@torch.no_grad()
def apply(
    model: nn.Module, bound: BoundPlan, *, keep_undo: bool, structure_only: bool = False
) -> tuple[nn.Module, Undo]:
    """Carry out a plan in place. Returns the root (new if the root itself is a norm) and what undoes it.

    bound: the plan, bound to `model`. structure_only replaces the modules and adds the biases, without moving any
    values: for loading a state dict of the converted network into it afterwards.
    """
    undo = Undo(complete=keep_undo or structure_only)
    # All copies are taken first: a gamma that two norms share is changed by the first one's step.
    copies = [_snapshot(each.module) if keep_undo else {} for each in bound]
    changed: set[int] = set()
    made: list[nn.Module] = []
    if structure_only:
        add_parameters(model, bound)
    else:
        undo.parameters = edit(model, bound, keep_undo=keep_undo)
    for each, before in zip(bound, copies, strict=True):
        step, old = each.step, each.module
        if structure_only:
            _give_values(old)
            if step.transfer.edits_producer:
                _add_biases(each)
            each = dataclasses.replace(each)  # to be read anew
        elif step.transfer.edits_producer:
            undo.layers += _fold(each, keep_undo=keep_undo)
        new = _replacement(each, bound.device, bound.dtype)
        _change_gamma(inner_norm(new), step, each.state, changed)
        hand_over(inner_norm(new), old, statistics=each.target.updates_statistics)
        names = (step.path, *step.aliases)
        if keep_undo:
            undo.norms.append(NormUndo(names, old, before, _given(inner_norm(new), before)))
        model = replace_module(model, names, new)
        made.append(new)
    fit_fast_paths(model, made)
    return model, undo


def _fold(bound: BoundStep, *, keep_undo: bool) -> list[LayerUndo]:
    scale, shift = folded_in(bound)
    records = [scale_layer(layer, path, scale, shift, keep_undo=keep_undo) for path, layer in bound.layers]
    return [record for record in records if record is not None]


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


def _give_values(norm: nn.Module) -> None:
    """Real zeros for a norm's parameters on the meta device; what is loaded later replaces them."""
    for name, parameter in norm._parameters.items():
        if parameter is not None and parameter.is_meta:
            norm._parameters[name] = nn.Parameter(torch.zeros(parameter.shape), parameter.requires_grad)


def _add_biases(bound: BoundStep) -> None:
    for layer in bound.producers:
        if layer.bias is None:
            gain = gain_of(layer)
            empty = gain.new_empty(bound.step.channels)
            layer._parameters["bias"] = nn.Parameter(empty, requires_grad=gain.requires_grad)


def _replacement(bound: BoundStep, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module that takes the norm's place, with its tail, hooks and attributes.

    device, dtype: of statistics that a norm without any gets, where it has no gamma to tell.
    """
    step, old = bound.step, bound.module
    state = dataclasses.replace(bound.state, dims=bound.state.dims or step.dims)
    if step.readers:
        state = dataclasses.replace(state, weight=None, bias=None)
    if step.transfer is Transfer.RESET:
        state = _reset(state)
    target = bound.target
    if target.needs_statistics and not state.has_statistics:
        state = _with_fresh_statistics(state, device, dtype)
    # Where no layer can take the running statistics in, a fixed map before the norm does.
    standardize = standardization(state, unit=step.unit) if step.transfer is Transfer.PRESCALE else None
    if step.transfer.leaves_nothing:
        norm: nn.Module = nn.Identity()
        norm.training = state.training
    else:
        norm = build(target, state, step.options)
        norm = padded(norm) if step.padded else norm
        _keep_parametrizations(old, norm)
    new = wrapped(norm, state, standardize, PaddedSequence if step.padded else NormSequence)
    was = bound.spec
    adopt(new, old, known=_ATTRIBUTES.union(was.attributes))
    _adopt_registered(new, old, known=_REGISTERED.union(was.tensors))
    return new


def scales_gamma(step: Step) -> bool:
    """Whether gamma is scaled by sqrt(1 + eps), so that a channel of unit variance passes unchanged."""
    return step.transfer.standardizes and step.options.eps is not None


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


def _with_fresh_statistics(state: NormState, device: torch.device, dtype: torch.dtype) -> NormState:
    if state.weight is not None:
        device, dtype = state.weight.device, state.weight.dtype
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
