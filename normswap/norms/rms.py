"""RMSNorm over the last dimension (`rms`): Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._building import with_affine
from ._formulas import ATTRIBUTES, computes, read_vectors, rms_norm
from .registry import register
from .spec import NormSpec, NormState, Options


class ShiftedRMSNorm(nn.RMSNorm):
    """RMSNorm with a beta: `y = x / sqrt(mean(x^2) + eps) * weight + bias`, the mean over the last dimension.

    Input and output `(*, C)`, of the same dtype. What a LayerNorm's gamma and beta are kept in.
    """

    bias: nn.Parameter

    def __init__(self, channels: int, eps: float | None = None, *, elementwise_affine: bool = True) -> None:
        super().__init__(channels, eps=eps, elementwise_affine=elementwise_affine)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias.to(x.dtype)


def _usual_eps(weight: Tensor | None) -> float:
    """What torch adds where a module's eps is None."""
    double = weight is not None and weight.dtype is torch.float64
    return torch.finfo(torch.float64 if double else torch.float32).eps


def _read(module: Any) -> NormState:
    if not isinstance(module, nn.RMSNorm):
        return read_vectors(module, channel_dim=-1)
    return NormState(
        channels=module.normalized_shape[-1] if len(module.normalized_shape) == 1 else 0,
        eps=_usual_eps(module.weight) if module.eps is None else module.eps,
        weight=module.weight,
        bias=module.bias if isinstance(module, ShiftedRMSNorm) else None,
        channel_dim=-1,
        training=module.training,
    )


def _build(state: NormState, options: Options) -> nn.Module:
    eps = 1e-5 if options.eps is None else options.eps
    unsaid = eps == _usual_eps(state.weight)  # None goes on following the dtype
    kind = nn.RMSNorm if state.bias is None else ShiftedRMSNorm
    module = kind(state.channels, eps=None if unsaid else eps, elementwise_affine=False)
    module.elementwise_affine = state.affine
    return with_affine(module, state)


register(
    NormSpec(
        name="rms",
        title="RMSNorm",
        formula="y = x / sqrt(mean(x^2) + eps) * weight (+ bias), the mean over channels, which come last",
        axes="channels, per sample and position",
        source="Zhang and Sennrich 2019; torch.nn.RMSNorm, and LlamaRMSNorm and the like of transformers",
        read=_read,
        build=_build,
        aliases=("rmsnorm",),
        classes=(nn.RMSNorm, ShiftedRMSNorm),
        matches=lambda module: computes(module, rms_norm, channel_dim=-1),
        attributes=ATTRIBUTES,
        channel_dim=-1,
        elements=lambda channels, positions, options: channels,
        exact_from=("rms",),
        centred_from=("ln",),
    )
)
