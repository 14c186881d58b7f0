"""Which tensor of a layer carries the gain of its output channels: its weight, or the `g` of its weight norm.

Weight norm (Salimans and Kingma 2016) computes `W = g v / ||v||`. With a `g` for each output channel, `g' = g s` is
`W' = W s`, whatever the sign, and v stays. Known are `torch.nn.utils.parametrizations.weight_norm`, and the older
`torch.nn.utils.weight_norm`, whose hook leaves the weight that it computed on the layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from .parametrized import forget

PARAMETRIZED = ".parametrizations."


def gain_name(layer: nn.Module) -> str | None:
    """The name in a convolution or linear layer of what scales its output channels one by one; None where nothing does.

    That is `weight` where it is a parameter. A weight norm whose gains are not one for each output channel has none.
    """
    if layer._parameters.get("weight") is not None:
        return "weight"
    names = _weight_norm(layer)
    return None if names is None else names[0]


def gain_of(layer: nn.Module) -> nn.Parameter:
    """The parameter that `gain_name` names: of the weight's shape, or `(C, 1, ...)`, `(1, C, 1, ...)` transposed.

    Raises TypeError for a layer without one.
    """
    if (name := gain_name(layer)) is None:
        raise TypeError(f"{type(layer).__name__} has no gain of its own for each output channel")
    return layer.get_parameter(name)


def direction_of(layer: nn.Module) -> nn.Parameter:
    """The parameter of the weight's shape: the weight, or the v of its weight norm."""
    names = None if layer._parameters.get("weight") is not None else _weight_norm(layer)
    return layer.get_parameter("weight" if names is None else names[1])


@torch.no_grad()
def refresh(layer: Any) -> None:
    """Compute the weight that a weight norm keeps on the layer anew, after its gain was changed."""
    forget()
    if (hook := _hook_of(layer)) is not None:
        layer.weight = hook.compute_weight(layer)


WEIGHT_NORM_NAMES = {"weight_g", "weight_v", "parametrizations"}
"""Attributes by which code gets at what a weight norm computes with."""


def without_weight_norm(layer: Any) -> Any:
    """A stand-in for a layer as it was before weight norm, with the weight of now as a parameter: it shares all else.

    The layer itself where its weight is a parameter; None where anything is computed otherwise.
    """
    if _weight_norm(layer) is None:
        return None if layer._parameters.get("weight") is None else layer
    if parametrize.is_parametrized(layer) and {*layer.parametrizations} - {"weight"}:
        return None
    bare: Any = object.__new__(
        parametrize.type_before_parametrizations(layer)
    )  # torch lets nobody copy what it computes
    bare.__dict__.update({key: value for key, value in layer.__dict__.items() if key != "weight"})
    bare._modules = {key: child for key, child in layer._modules.items() if key not in WEIGHT_NORM_NAMES}
    hooks = layer._forward_pre_hooks.items()
    bare._forward_pre_hooks = OrderedDict((key, hook) for key, hook in hooks if type(hook) is not WeightNorm)
    kept = {key: value for key, value in layer._parameters.items() if key not in WEIGHT_NORM_NAMES}
    bare._parameters = {"weight": nn.Parameter(layer.weight.detach(), requires_grad=False), **kept}
    return bare


def foreign_hooks(layer: nn.Module) -> bool:
    """Whether hooks other than weight norm's see the layer's input or output."""
    hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
    return any(type(hook) is not WeightNorm for hook in hooks)


def kept_weight(layer: Any) -> Tensor | None:
    """The weight that a weight norm has computed and keeps, where other code may read it; None if each asks anew.

    The older form keeps it always, the newer one within `parametrize.cached()`.
    """
    if gain_name(layer) in (None, "weight"):
        return None
    weight: Tensor = layer.weight
    return weight if weight is layer.weight else None


def computed_weights(model: nn.Module) -> Iterator[nn.Module]:
    """The layers whose weight the older weight norm computes."""
    return (module for module in nn.Module.modules(model) if _hook_of(module) is not None)


def layer_of(name: str) -> str:
    """The path of the layer that a parameter, or a part of a layer's parametrization, belongs to, by its name."""
    head, parametrized, _ = name.partition(PARAMETRIZED)
    return head if parametrized else name.rpartition(".")[0]


def _hook_of(layer: nn.Module) -> Any:
    found = (hook for hook in layer._forward_pre_hooks.values() if type(hook) is WeightNorm and hook.name == "weight")
    return next(found, None)


def _weight_norm(layer: Any) -> tuple[str, str] | None:
    """The names of g and v, parameters, where the weight is theirs, and g has one number for each output channel."""
    axis, holder = 0, layer
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, *k): the channels of all groups share what is in dim 1
        axis = 1 if layer.groups == 1 else -1
    if (hook := _hook_of(layer)) is not None:
        dim, names = hook.dim, ("weight_g", "weight_v")
    elif parametrize.is_parametrized(layer, "weight"):
        chain = layer.parametrizations["weight"]
        if len(chain) != 1 or type(chain[0]) is not _WeightNorm:
            return None
        holder = chain
        dim, names = chain[0].dim, ("parametrizations.weight.original0", "parametrizations.weight.original1")
    else:
        return None
    computed = any(holder._parameters.get(name.rpartition(".")[2]) is None for name in names)
    return names if dim == axis >= 0 and not computed else None
