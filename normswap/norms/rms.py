"""RMSNorm over the last dimension (`rms`): Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._building import with_affine
from .registry import register
from .spec import NormSpec, NormState, Options


def _usual_eps(weight: Tensor | None) -> float:
    """What torch adds where a module's eps is None."""
    double = weight is not None and weight.dtype is torch.float64
    return torch.finfo(torch.float64 if double else torch.float32).eps


def _read(module: Any) -> NormState:
    return NormState(
        channels=module.normalized_shape[-1] if len(module.normalized_shape) == 1 else 0,
        eps=_usual_eps(module.weight) if module.eps is None else module.eps,
        weight=module.weight,
        channel_dim=-1,
        training=module.training,
    )


def _build(state: NormState, options: Options) -> nn.Module:
    eps = 1e-5 if options.eps is None else options.eps
    unsaid = eps == _usual_eps(state.weight)  # None goes on following the dtype
    module = nn.RMSNorm(state.channels, eps=None if unsaid else eps, elementwise_affine=False)
    module.elementwise_affine = state.affine
    return with_affine(module, state)


register(
    NormSpec(
        name="rms",
        title="RMSNorm",
        formula="y = x / sqrt(mean(x^2) + eps) * weight, the mean over the channels at each position; channels last",
        axes="channels, per sample and position",
        source="Zhang and Sennrich 2019; torch.nn.RMSNorm",
        read=_read,
        build=_build,
        aliases=("rmsnorm",),
        classes=(nn.RMSNorm,),
        attributes=("normalized_shape", "elementwise_affine"),
        channel_dim=-1,
        bias=False,
        elements=lambda channels, positions, options: channels,
        exact_from=("rms",),
    )
)
