"""What several norm types share: reading a norm's tensors, and handing a gamma and beta to a new module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .spec import NormState

# A fused norm-activation layer runs these after the norm, in this order (timm.layers.norm_act).
TAIL = ("drop", "act", "aa")


def read_tail(module: nn.Module) -> dict[str, nn.Module]:
    """The parts a fused layer runs after its norm; identities are left out."""
    children = module._modules
    parts = {name: children.get(name) for name in TAIL}
    return {name: part for name, part in parts.items() if part is not None and not isinstance(part, nn.Identity)}


def read_statistics_norm(module: Any, *, dims: int | None, eps: float | None = None) -> NormState:
    """Read any norm with the attribute names of `torch.nn.BatchNorm2d`."""
    tables = {**module.__dict__, **module._parameters, **module._buffers}  # `getattr` on a module is slow

    def value(name: str, default: Any = None) -> Any:
        return tables[name] if name in tables else getattr(module, name, default)

    mean, var, weight = (value(name) for name in ("running_mean", "running_var", "weight"))
    known = next((t for t in (mean, var, weight) if t is not None), None)
    return NormState(
        channels=value("num_features", 0) or (known.numel() if known is not None else 0),
        eps=float(value("eps")) if eps is None else eps,
        weight=weight,
        bias=value("bias"),
        running_mean=mean,
        running_var=var,
        num_batches_tracked=value("num_batches_tracked"),
        momentum=value("momentum", 0.1),
        dims=dims,
        training=module.training,
        process_group=tables.get("process_group"),
        tail=read_tail(module),
    )


def with_affine(module: nn.Module, state: NormState) -> nn.Module:
    """Give `module` the state's gamma and beta as its parameters.

    A Parameter is handed over as the same object, so that optimizers, ties and `requires_grad` survive; a buffer
    (frozen BN) becomes a trainable Parameter that shares no storage with it.
    """
    if state.weight is not None:
        module._parameters["weight"] = as_parameter(state.weight)
        if "bias" in module._parameters:
            module._parameters["bias"] = None if state.bias is None else as_parameter(state.bias)
    module.training = state.training
    return module


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor itself if it is a Parameter, else a trainable copy of it."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().clone())


def affine_or_identity(state: NormState, like: Tensor) -> tuple[Tensor, Tensor]:
    """Gamma and beta of shape `(C,)`, with ones and zeros where the norm has none."""
    weight = torch.ones_like(like) if state.weight is None else state.weight
    bias = torch.zeros_like(like) if state.bias is None else state.bias
    return weight, bias


def require_dims(state: NormState) -> int:
    """The state's spatial dimensions; the plan makes sure they are known before a type that needs them is built."""
    if state.dims is None:
        raise ValueError("spatial dimensions are unknown")
    return state.dims
