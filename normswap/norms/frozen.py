"""Frozen BatchNorm (`frozen`): the running statistics and gamma, beta as one fixed per-channel map.

He et al. 2016 and detectron2 (`FrozenBatchNorm2d`); keys as in torchvision.ops.FrozenBatchNorm2d. Reads the frozen
BN of torchvision, timm, transformers and detectron2, by structure, so that none of them has to be installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modules.restore import evaluating
from ._building import TAIL, affine_or_identity, read_statistics_norm
from ._wrappers import per_channel
from .registry import register
from .spec import NormSpec, NormState, Options

_BUFFERS = {"weight", "bias", "running_mean", "running_var"}


class FrozenBatchNorm(nn.Module):
    """`y = x * scale + shift`, with `scale = weight / sqrt(running_var + eps)`, `shift = bias - running_mean * scale`.

    Input `(N, C, *)` of any dimensionality and floating dtype; output of the same shape and dtype. Everything is a
    buffer: nothing trains, nothing moves in `train()`, and nothing of the input is saved for the backward pass.

    scale and shift are cached in the buffers' dtype, computed in at least float32. They are renewed by
    `load_state_dict` and move with `.to`; after changing a buffer in place by hand, call `refresh()`.

    The state dict is that of torchvision's FrozenBatchNorm2d; a BN's `num_batches_tracked` is accepted and dropped.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        kwargs = {"device": device, "dtype": dtype}
        for name in ("weight", "running_var", "scale"):
            self.register_buffer(name, torch.ones(num_features, **kwargs), persistent=name != "scale")
        for name in ("bias", "running_mean", "shift"):
            self.register_buffer(name, torch.zeros(num_features, **kwargs), persistent=name != "shift")
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute scale and shift anew from the four buffers."""
        dtype = torch.promote_types(self.running_var.dtype, torch.float32)
        scale = self.weight.to(dtype) * torch.rsqrt(self.running_var.to(dtype) + self.eps)
        shift = self.bias.to(dtype) - self.running_mean.to(dtype) * scale
        self.scale, self.shift = scale.to(self.weight.dtype), shift.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = per_channel(self.scale, x.dim()), per_channel(self.shift, x.dim())
        return torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.refresh()

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


def _looks_frozen(module: nn.Module) -> bool:
    """Structure first (four buffers, no parameters), then proof: on a small input it must compute the formula."""
    buffers, children = set(module._buffers) - {"num_batches_tracked"}, set(module._modules)
    if buffers != _BUFFERS or any(p is not None for p in module._parameters.values()) or children - set(TAIL):
        return False
    if any(module._buffers[name] is None for name in _BUFFERS) or module.running_var.is_meta:
        return "Frozen" in type(module).__name__
    return _computes_formula(module, _eps_of(module))


def _eps_of(module: nn.Module) -> float:
    return float(getattr(module, "eps", 1e-5))  # transformers' DetrFrozenBatchNorm2d keeps 1e-5 in its forward


@torch.no_grad()
def _computes_formula(module: Any, eps: float) -> bool:
    state = read_statistics_norm(module, dims=None, eps=eps)
    channels = state.channels
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 2, 2, generator=generator).to(module.running_var)
    y = per_channel(module.running_var + eps, 4).rsqrt() * per_channel(module.weight, 4)
    expected = (x - per_channel(module.running_mean, 4)) * y + per_channel(module.bias, 4)
    try:
        with evaluating(module):
            for part in state.tail.values():
                expected = part.forward(expected)
            actual = module.forward(x)  # not module(x): its hooks are not for a probe
    except Exception:  # a stranger's forward: whatever it raises, it is not the formula
        return False
    tolerance = 1e-4 if actual.dtype in (torch.float32, torch.float64) else 3e-2
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def _read(module: Any) -> NormState:
    dims = None if isinstance(module, FrozenBatchNorm) else 2
    return read_statistics_norm(module, dims=dims, eps=_eps_of(module))


def _build(state: NormState, options: Options) -> nn.Module:
    module = FrozenBatchNorm(0, state.eps if options.eps is None else options.eps)
    module.num_features = state.channels
    mean, var = state.statistics
    weight, bias = affine_or_identity(state, var)
    named = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    module._buffers.update({name: tensor.detach() for name, tensor in named.items()})
    module.refresh()
    module.training = state.training
    return module


register(
    NormSpec(
        name="frozen",
        title="Frozen BatchNorm",
        formula="y = (x - running_mean) / sqrt(running_var + eps) * weight + bias, all of them fixed",
        axes="none: a fixed map per channel",
        source="detectron2 and torchvision.ops.FrozenBatchNorm2d",
        read=_read,
        build=_build,
        classes=(FrozenBatchNorm,),
        matches=_looks_frozen,
        aliases=("frozenbn", "frozenbatchnorm"),
        attributes=("num_features",),
        tensors=("scale", "shift"),
        statistics="fixed",
    )
)
