"""GroupNorm (`gn`). Wu and He 2018, "Group Normalization"; torch.nn.GroupNorm and timm's GroupNorm, GroupNormAct."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import OptionError, plural
from ._building import read_tail, with_affine
from ._padded import PaddedGroupNorm
from .registry import register
from .spec import DoesNotFit, NormRequest, NormSpec, NormState, Options

AUTO_CHANNELS_PER_GROUP = 16  # Wu and He 2018, table 3: 16 channels a group is their best fixed choice


@dataclass(frozen=True)
class GroupOptions(Options):
    """num_groups: groups of the layer; divides its channels."""

    num_groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.num_groups, int) or self.num_groups < 1:
            raise OptionError(f"num_groups must be a positive integer, got {self.num_groups!r}")

    def misfit(self, channels: int) -> str | None:
        """Channels that do not divide into the groups."""
        if channels % self.num_groups == 0:
            return None
        return f"{plural(channels, 'channel')} do not divide into {plural(self.num_groups, 'group')}"


@functools.cache
def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def fit_groups(state: NormState, request: NormRequest) -> GroupOptions:
    """Choose `num_groups` for one layer. Raises DoesNotFit, naming the allowed numbers, where the request does not."""
    channels, nearest = state.channels, request.indivisible == "nearest"
    allowed = divisors(channels)
    if request.channels_per_group is not None:
        size = request.channels_per_group
        if size > channels and not nearest:
            raise _indivisible(f"{channels} channels are fewer than {size} per group", "per group", allowed)
        if channels % size and not nearest:
            raise _indivisible(f"{channels} channels do not divide by {size} per group", "per group", allowed)
        groups = channels // max(d for d in allowed if d <= size)
    elif request.groups in (None, "auto"):
        groups = min(allowed, key=lambda d: (abs(math.log(channels / d / AUTO_CHANNELS_PER_GROUP)), d))
    else:
        wanted = int(request.groups)
        if channels % wanted and not nearest:
            more = "are fewer than" if wanted > channels else "do not divide into"
            raise _indivisible(f"{channels} channels {more} {wanted} groups", "groups", allowed)
        groups = max(d for d in allowed if d <= wanted)
    return GroupOptions(eps=request.eps, num_groups=groups)


def _indivisible(reason: str, what: str, allowed: list[int]) -> DoesNotFit:
    return DoesNotFit(f"{reason}; allowed {what}: {', '.join(map(str, allowed))}", divisibility=True)


def _read(module: Any) -> NormState:
    return NormState(
        channels=module.num_channels,
        eps=module.eps,
        weight=module.weight,
        bias=module.bias,
        num_groups=module.num_groups,
        training=module.training,
        tail=read_tail(module),
    )


def build_group_norm(state: NormState, num_groups: int, eps: float) -> nn.GroupNorm:
    """A plain `nn.GroupNorm` with the state's gamma and beta."""
    module = nn.GroupNorm(num_groups, state.channels, eps=eps, affine=False)
    module.affine = state.affine
    with_affine(module, state)
    return module


def _build(state: NormState, options: GroupOptions) -> nn.Module:
    return build_group_norm(state, options.num_groups, 1e-5 if options.eps is None else options.eps)


register(
    NormSpec(
        name="gn",
        title="GroupNorm",
        formula="y = (x - mean_g) / sqrt(var_g + eps) * weight + bias, mean_g and var_g of the channel's group",
        axes="positions and the channels of a group, per sample",
        source="Wu and He 2018; torch.nn.GroupNorm",
        read=_read,
        build=_build,
        options=GroupOptions,
        fit=fit_groups,
        classes=(nn.GroupNorm, PaddedGroupNorm),
        class_names=tuple(
            f"timm.layers.{n}"
            for n in ("norm.GroupNorm", "norm.GroupNorm1", "norm_act.GroupNormAct", "norm_act.GroupNorm1Act")
        ),
        aliases=("groupnorm",),
        attributes=("num_groups", "num_channels", "_fast_norm"),
        takes_groups=True,
        groups=lambda state, options: state.num_groups if options is None else options.num_groups,
        exact_from=("gn", "in", "adain"),
        elements=lambda channels, positions, options: channels // options.num_groups * positions,
    )
)
