"""BN folded away (`fused`): statistics, gamma and beta all go into the layer that feeds the BN.

Jacob et al. 2018, section 3.2; as torch.nn.utils.fusion.fuse_conv_bn_eval. Where no single layer feeds the BN, what
remains of it is a per-channel `ChannelAffine`, trainable, which is no norm. A target only.
"""

from __future__ import annotations

import torch
from torch import nn

from ._building import affine_or_identity
from ._wrappers import ChannelAffine
from .registry import register
from .spec import NormSpec, NormState, Options


def scale_and_shift(state: NormState) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole BN in eval as `y = scale * x + shift`, each `(C,)`, computed in at least float32."""
    mean, var = state.statistics
    dtype = torch.promote_types(var.dtype, torch.float32)
    weight, bias = (t.detach().to(dtype) for t in affine_or_identity(state, var))
    scale = weight * torch.rsqrt(var.to(dtype) + state.eps)
    return scale, bias - mean.to(dtype) * scale


def _read(module: nn.Module) -> NormState:
    raise TypeError("a fused norm leaves nothing to read")


def _build(state: NormState, options: Options) -> nn.Module:
    """What remains where the BN cannot go into the layer before it."""
    scale, shift = scale_and_shift(state)
    dtype = state.statistics[1].dtype
    module = ChannelAffine(scale.to(dtype), shift.to(dtype), trainable=True)
    module.training = state.training
    return module


register(
    NormSpec(
        name="fused",
        title="BN folded into its layer",
        formula="W' = W * weight / sqrt(var + eps), b' = (b - mean) * weight / sqrt(var + eps) + bias; no norm is left",
        axes="none: no norm is left",
        source="Jacob et al. 2018; torch.nn.utils.fusion",
        read=_read,
        build=_build,
        statistics="fixed",
        fuses=True,
    )
)
