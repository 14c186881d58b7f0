"""InstanceNorm (`in`). Ulyanov et al. 2016, "Instance Normalization"; torch.nn.InstanceNorm1d/2d/3d."""

from __future__ import annotations

from typing import Any

from torch import nn

from ._building import read_statistics_norm, require_dims, with_affine
from ._padded import PaddedInstanceNorm1d
from .registry import register
from .spec import NormSpec, NormState, Options

BY_DIMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_DIMS = {cls: dims for dims, cls in BY_DIMS.items()}


def _read(module: Any) -> NormState:
    return read_statistics_norm(module, dims=next(_DIMS[c] for c in type(module).__mro__ if c in _DIMS))


def _build(state: NormState, options: Options) -> nn.Module:
    eps = 1e-5 if options.eps is None else options.eps
    module = BY_DIMS[require_dims(state)](state.channels, eps=eps, affine=False)
    module.affine = state.affine
    return with_affine(module, state)


register(
    NormSpec(
        name="in",
        title="InstanceNorm",
        formula="y = (x - mean_c) / sqrt(var_c + eps) * weight + bias, mean_c and var_c of the channel in the sample",
        axes="positions, per sample and channel",
        source="Ulyanov et al. 2016; torch.nn.InstanceNorm1d/2d/3d",
        read=_read,
        build=_build,
        classes=(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, PaddedInstanceNorm1d),
        aliases=("instancenorm",),
        attributes=("num_features", "momentum", "track_running_stats"),
        needs_dims=True,
        groups=lambda state, options: state.channels,
        exact_from=("in", "adain"),
        elements=lambda channels, positions, options: positions,
    )
)
