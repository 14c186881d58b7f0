"""LayerNorm: over all channels and positions (`ln`), or over the channels at each position (`ln-channel`).

Ba, Kiros and Hinton 2016, "Layer Normalization"; over channels as in ConvNeXt (Liu et al. 2022). Reads
torch.nn.LayerNorm, the `LayerNorm2d` of torchvision and timm, and any class that computes either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._building import read_tail, with_affine
from ._formulas import ATTRIBUTES, computes, layer_norm, read_vectors
from .group import build_group_norm
from .registry import register
from .spec import NormSpec, NormState, Options


class ChannelLayerNorm(nn.Module):
    """`y = (x - mean) / sqrt(var + eps) * weight + bias`, mean and var over the channels of each position.

    Input and output `(N, C, *)` of any dimensionality. The values equal `nn.LayerNorm(C)` on the channels-last view.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, num_channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.num_channels, self.eps, self.affine = num_channels, eps, affine
        self.register_parameter("weight", nn.Parameter(torch.ones(num_channels)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_channels)) if affine else None)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.movedim(1, -1), (self.num_channels,), self.weight, self.bias, self.eps)
        return y.movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, affine={self.affine}"


def _read_all(module: Any) -> NormState:
    """`nn.LayerNorm` on tokens `(*, C)`; on one vector per sample `(N, C)` this is also a norm over all channels."""
    if not isinstance(module, nn.LayerNorm):
        return read_vectors(module, channel_dim=-1)
    return NormState(
        channels=module.normalized_shape[-1] if len(module.normalized_shape) == 1 else 0,
        eps=module.eps,
        weight=module.weight,
        bias=module.bias,
        channel_dim=-1,
        training=module.training,
        tail=read_tail(module),
    )


def _read_channel(module: Any) -> NormState:
    if not isinstance(module, ChannelLayerNorm):
        return read_vectors(module, channel_dim=1)
    return NormState(
        channels=module.num_channels,
        eps=module.eps,
        weight=module.weight,
        bias=module.bias,
        training=module.training,
    )


def _build_all(state: NormState, options: Options) -> nn.Module:
    if state.channel_dim == -1:
        module = nn.LayerNorm(state.channels, 1e-5 if options.eps is None else options.eps, elementwise_affine=False)
        module.elementwise_affine = state.affine
        return with_affine(module, state)
    return build_group_norm(state, 1, 1e-5 if options.eps is None else options.eps)


def _build_channel(state: NormState, options: Options) -> nn.Module:
    module = ChannelLayerNorm(state.channels, 1e-5 if options.eps is None else options.eps, affine=False)
    module.affine = state.affine
    return with_affine(module, state)


register(
    NormSpec(
        name="ln",
        title="LayerNorm over channels and positions",
        formula="y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var of the sample; equals gn with 1 group",
        axes="channels and positions, per sample",
        source="Ba, Kiros and Hinton 2016; built as torch.nn.GroupNorm(1, C)",
        read=_read_all,
        build=_build_all,
        classes=(nn.LayerNorm,),
        class_names=("timm.layers.norm.LayerNorm", "timm.layers.norm_act.LayerNormAct"),
        matches=lambda module: computes(module, layer_norm, channel_dim=-1),
        aliases=("layernorm",),
        attributes=ATTRIBUTES,
        groups=lambda state, options: 1,
        elements=lambda channels, positions, options: channels * positions,
    )
)
register(
    NormSpec(
        name="ln-channel",
        title="LayerNorm over channels",
        formula="y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over the channels at each position",
        axes="channels, per sample and position",
        source="Liu et al. 2022 (ConvNeXt); torchvision and timm LayerNorm2d",
        read=_read_channel,
        build=_build_channel,
        classes=(ChannelLayerNorm,),
        class_names=(
            "torchvision.models.convnext.LayerNorm2d",
            "timm.layers.norm.LayerNorm2d",
            "timm.layers.norm_act.LayerNormAct2d",
        ),
        matches=lambda module: computes(module, layer_norm, channel_dim=1),
        aliases=("channellayernorm", "layernorm2d"),
        attributes=("num_channels", *ATTRIBUTES),
        exact_from=("ln-channel",),
        elements=lambda channels, positions, options: channels,
    )
)
