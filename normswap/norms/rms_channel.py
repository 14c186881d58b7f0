"""RMSNorm over the channels at each position (`rms-channel`): Zhang and Sennrich 2019, as in timm's `RmsNorm2d`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modules.precision import at_least_float32
from ._building import with_affine
from ._formulas import ATTRIBUTES, computes, read_vectors, rms_norm
from ._wrappers import per_channel
from .registry import register
from .spec import NormSpec, NormState, Options


class ChannelRMSNorm(nn.Module):
    """`y = x / sqrt(mean(x^2) + eps) * weight + bias`, the mean over the channels of each position.

    Input and output `(N, C, *)` of any dimensionality, of the same dtype. bias: whether there is a beta.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, num_channels: int, eps: float = 1e-5, affine: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.num_channels, self.eps, self.affine = num_channels, eps, affine
        self.register_parameter("weight", nn.Parameter(torch.ones(num_channels)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_channels)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        y = rms_norm(at_least_float32(x), 1, self.eps)
        if self.weight is not None:
            y = y * per_channel(self.weight, x.dim())
        if self.bias is not None:
            y = y + per_channel(self.bias, x.dim())
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, affine={self.affine}"


def _read(module: Any) -> NormState:
    if not isinstance(module, ChannelRMSNorm):
        return read_vectors(module, channel_dim=1)
    return NormState(
        channels=module.num_channels,
        eps=module.eps,
        weight=module.weight,
        bias=module.bias,
        training=module.training,
    )


def _build(state: NormState, options: Options) -> nn.Module:
    module = ChannelRMSNorm(state.channels, 1e-5 if options.eps is None else options.eps, affine=False)
    module.affine = state.affine
    return with_affine(module, state)


register(
    NormSpec(
        name="rms-channel",
        title="RMSNorm over channels",
        formula="y = x / sqrt(mean(x^2) + eps) * weight (+ bias), the mean over the channels at each position",
        axes="channels, per sample and position",
        source="Zhang and Sennrich 2019; timm RmsNorm2d",
        read=_read,
        build=_build,
        classes=(ChannelRMSNorm,),
        matches=lambda module: computes(module, rms_norm, channel_dim=1),
        aliases=("channelrmsnorm", "rmsnorm2d"),
        attributes=("num_channels", *ATTRIBUTES),
        exact_from=("rms-channel",),
        elements=lambda channels, positions, options: channels,
    )
)
