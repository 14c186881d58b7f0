"""Parameters of other layers than those before a norm, changed so that the network stays the same.

Centring takes the mean over channels out of what writes to a residual stream (Jiang et al. 2023, arXiv:2305.14858).
Readers, the linear layers behind a norm, take its gamma and beta in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..files.spilling import spilled_copy
from ..modules.precision import at_least_float32
from ..modules.tree import module_at
from ..norms.spec import NormState
from ..planning.plan import Centred
from ..tracing.readers import Reader
from .bound import BoundPlan
from .exact_scaling import layer_digest
from .undo_record import ParameterUndo


def centred(tensor: Tensor, dim: int, scale: Tensor | None = None) -> Tensor:
    """The tensor without its mean over a dimension, computed in float64.

    scale: `(C,)`, what multiplies the channels before the mean is taken, which is divided by it again.
    """
    wide = tensor.detach().double()
    if scale is None:
        return (wide - wide.mean(dim, keepdim=True)).to(tensor.dtype)
    by = scale.detach().double().view([-1 if i == dim % tensor.dim() else 1 for i in range(tensor.dim())])
    return (wide - (wide * by).mean(dim, keepdim=True) / by).to(tensor.dtype)


@torch.no_grad()
def edit(model: nn.Module, bound: BoundPlan, *, keep_undo: bool) -> list[ParameterUndo]:
    """Let readers take gamma and beta in, then take the means out of what writes to streams, in place.

    bound: the plan, bound to the network that is to be changed, before its norms are. Returns the originals.
    """
    names = bound.plan.edited
    kept = {name: None if (p := parameter(model, name)) is None else spilled_copy(p.detach()) for name in names}
    for each in bound:
        for reader in each.step.readers:
            _take_in(model, reader, each.state)
    for one in bound.plan.centred:
        _centre(model, one)
    if not keep_undo:
        return []
    now = {name: parameter(model, name) for name in names}
    return [ParameterUndo(name, kept[name], layer_digest(p)) for name, p in now.items() if p is not None]


def parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter by its name, None where the module has that place empty."""
    owner, _, leaf = name.rpartition(".")
    found: nn.Parameter | None = module_at(model, owner)._parameters.get(leaf)
    return found


def add_parameters(model: nn.Module, bound: BoundPlan) -> None:
    """The biases that readers get, without values."""
    for each in bound:
        for reader in each.step.readers:
            if each.state.bias is not None and parameter(model, reader.bias) is None:
                _new_bias(model, reader)


def _new_bias(model: nn.Module, reader: Reader) -> nn.Parameter:
    owner, _, leaf = reader.bias.rpartition(".")
    weight: Any = parameter(model, reader.weight)
    size = weight.shape[0] if reader.dim == 1 else weight.shape[1]
    bias = nn.Parameter(weight.new_zeros(size), requires_grad=weight.requires_grad)
    module_at(model, owner)._parameters[leaf] = bias
    return bias


def _take_in(model: nn.Module, reader: Reader, state: NormState) -> None:
    """`W' = W diag(gamma)` and `b' = b + W beta`, over the dimension of the weight that is summed over."""
    weight: Any = parameter(model, reader.weight)
    wide = weight.detach().double()
    over = [-1 if i == reader.dim else 1 for i in range(wide.dim())]
    if state.bias is not None:
        bias = parameter(model, reader.bias)
        bias = _new_bias(model, reader) if bias is None else bias
        out = 0 if reader.dim == 1 else 1
        added = (wide * state.bias.detach().double().view(over)).sum([i for i in range(wide.dim()) if i != out])
        bias.data.copy_(bias.detach().double() + added)
    if state.weight is not None:
        weight.data.copy_(wide * state.weight.detach().double().view(over))


def _centre(model: nn.Module, one: Centred) -> None:
    target: Any = parameter(model, one.parameter)
    scales = [at_least_float32(model.get_parameter(name)).double().view(-1) for name in one.scales]
    scale = math.prod(scales[1:], start=scales[0]) if scales else None
    target.data.copy_(centred(target, one.dim, scale))
