"""Norms of other libraries, told by what they compute rather than by their names.

There are hundreds of classes like transformers' `LlamaRMSNorm`. One counts as a norm if, with a gamma and beta drawn at
random, it computes that norm's formula, on inputs so large that eps does not matter and on some so small that it does.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.restore import evaluating
from ._building import TAIL, read_tail
from .spec import NormState

EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps")
"""What libraries call it."""
ATTRIBUTES = (*EPS_NAMES, "normalized_shape", "elementwise_affine", "data_format", "_fast_norm", "memory_efficient")
"""What such classes keep on an instance."""


def layer_norm(x: Tensor, dim: int, eps: float) -> Tensor:
    """LayerNorm over one dimension, before gamma and beta."""
    centred = x - x.mean(dim, keepdim=True)
    return centred / (centred.square().mean(dim, keepdim=True) + eps).sqrt()


def rms_norm(x: Tensor, dim: int, eps: float) -> Tensor:
    """RMSNorm over one dimension, before gamma and beta."""
    return x / (x.square().mean(dim, keepdim=True) + eps).sqrt()


def read_vectors(module: nn.Module, channel_dim: int) -> NormState:
    """The state of a norm with at most a gamma and a beta, whatever its eps is called. Two spatial dimensions are all
    that is known to suit one whose channels come second."""
    eps = _eps_of(module)
    weight = module._parameters.get("weight")
    return NormState(
        channels=_channels(module),
        eps=1e-5 if eps is None else eps,
        weight=weight,
        bias=module._parameters.get("bias"),
        channel_dim=channel_dim,
        dims=2 if channel_dim == 1 else None,
        training=module.training,
        tail=read_tail(module),
    )


def computes(module: nn.Module, formula: Callable[[Tensor, int, float], Tensor], channel_dim: int) -> bool:
    """Whether a module is named a norm, is made like one, and computes a formula over the dimension of channels."""
    if "norm" not in type(module).__name__.lower() or not _is_made_like_one(module):
        return False
    try:
        return _agrees(module, formula, channel_dim)
    except Exception:  # a stranger's forward: whatever it raises, it is not the formula
        return False


def _eps_of(module: Any) -> float | None:
    values = (module.__dict__.get(name) for name in EPS_NAMES)
    return next((float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)), None)


def _channels(module: Any) -> int:
    """0 where it normalizes over several dimensions, or where nothing says how many there are."""
    weight, shape = module._parameters.get("weight"), module.__dict__.get("normalized_shape")
    if weight is not None:
        return int(weight.numel()) if weight.dim() == 1 else 0
    shape = (shape,) if isinstance(shape, int) else shape
    return int(shape[0]) if isinstance(shape, (tuple, list)) and len(shape) == 1 else 0


def _is_made_like_one(module: nn.Module) -> bool:
    """An eps, at most a gamma and a beta as vectors, and a forward of one input: a gate or a condition is another."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    holds_more = set(parameters) - {"weight", "bias"} or any(b is not None for b in module._buffers.values())
    if holds_more or set(module._modules) - set(TAIL) or _eps_of(module) is None:
        return False
    channels = _channels(module)
    if channels < 2 or any(p.shape != (channels,) for p in parameters.values()):
        return False
    return len(inspect.signature(type(module).forward).parameters) == 2  # self, and the input


@torch.no_grad()
def _agrees(module: nn.Module, formula: Callable[[Tensor, int, float], Tensor], channel_dim: int) -> bool:
    """A copy with other parameters is run, so that neither gammas of 0 nor the meta device hide what it computes."""
    state = read_vectors(module, channel_dim)
    device = state.weight.device if state.weight is not None else torch.device("cpu")
    device = torch.device("cpu") if device.type == "meta" else device
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device) + 0.5

    probe: Any = copy.copy(module)
    given = {name: None if p is None else nn.Parameter(drawn(state.channels)) for name, p in probe._parameters.items()}
    probe.__dict__["_parameters"] = given
    around = (7, 4) if state.channels in (3, 5) else (3, 5)  # told from the channels
    x = drawn(2, state.channels, *around) if channel_dim == 1 else drawn(2, *around, state.channels)
    x[1] *= state.eps**0.5 or 1.0  # there eps is half of what is divided by
    expected = formula(x, channel_dim, state.eps)
    for name, apply in (("weight", torch.mul), ("bias", torch.add)):
        vector = given.get(name)
        if vector is not None:
            expected = apply(expected, vector if channel_dim == -1 else vector[:, None, None])
    probe.training = False
    with evaluating(module):
        for part in state.tail.values():
            expected = part.forward(expected)
        actual = probe.forward(x)  # not probe(x): its hooks are not for this
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)
