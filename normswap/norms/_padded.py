"""Norms over time that leave padded steps out: the statistics of a sample are those of its own steps.

For what `pad_packed_sequence` gives, whose padded steps are zeros at the end. There a norm is what it was at a step of
zeros, gamma and beta of it alone, so that what padding holds depends on no other step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._wrappers import NormSequence, per_channel


def valid_steps(x: Tensor) -> Tensor:
    """Of `(N, C, T)`: the steps `(N, T)`, bool, up to the last that is not 0 in all channels."""
    some = (x != 0).any(1)
    return some.flip(-1).cumsum(-1).flip(-1) > 0


def masked_norm(
    x: Tensor, valid: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group norm of `(N, C, T)` over the valid steps `(N, T)`; elsewhere gamma and beta alone."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    grouped = wide.unflatten(1, (num_groups, -1))
    mask = valid[:, None, None].to(wide.dtype)
    count = (mask.sum((2, 3), keepdim=True) * grouped.shape[2]).clamp_min(1)
    mean = (grouped * mask).sum((2, 3), keepdim=True) / count
    var = ((grouped - mean) * mask).square().sum((2, 3), keepdim=True) / count
    y = torch.where(mask > 0, (grouped - mean) * torch.rsqrt(var + eps), grouped).flatten(1, 2).to(x.dtype)
    y = y if weight is None else y * per_channel(weight.to(x.dtype), 3)
    return y if bias is None else y + per_channel(bias.to(x.dtype), 3)


class PaddedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` over the steps of each sample that are not padding; of other inputs than `(N, C, T)`, as it is.

    valid: the steps `(N, T)`, bool, where a fixed map has moved the zeros that tell of them.
    """

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        if x.dim() != 3:
            return super().forward(x)
        valid = valid_steps(x) if valid is None else valid
        return masked_norm(x, valid, self.num_groups, self.weight, self.bias, self.eps)


class PaddedInstanceNorm1d(nn.InstanceNorm1d):
    """`nn.InstanceNorm1d` over the steps of each sample that are not padding; see `PaddedGroupNorm`."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        if x.dim() != 3:
            return super().forward(x)
        valid = valid_steps(x) if valid is None else valid
        return masked_norm(x, valid, x.shape[1], self.weight, self.bias, self.eps)


PADDED = (PaddedGroupNorm, PaddedInstanceNorm1d)
_OF: dict[type[nn.Module], type[nn.Module]] = {nn.GroupNorm: PaddedGroupNorm, nn.InstanceNorm1d: PaddedInstanceNorm1d}


def padded(norm: nn.Module) -> nn.Module:
    """The same norm, of a class that leaves padded steps out. Raises TypeError where none is known."""
    if type(norm) not in _OF:
        raise TypeError(f"{type(norm).__name__} has no form that leaves padded steps out")
    norm.__class__ = _OF[type(norm)]
    return norm


class PaddedSequence(NormSequence):
    """A `NormSequence` that tells its norm which steps are padding, as what comes before moves them from 0."""

    def forward(self, x: Tensor) -> Tensor:
        valid = valid_steps(x) if x.dim() == 3 else None
        for module in self._modules.values():
            if module is not None:
                x = module(x, valid) if isinstance(module, PADDED) else module(x)
        return x


def told_valid(norm: nn.Module, args: tuple[Tensor, ...]) -> Tensor | None:
    """The valid steps `(N, T)` of what a norm is called with; None where it leaves none out."""
    if not isinstance(norm, PADDED) or args[0].dim() != 3:
        return None
    return valid_steps(args[0]) if len(args) < 2 else args[1]


def only(x: Tensor, valid: Tensor | None) -> Tensor:
    """The valid steps of `(N, C, T)` as `(steps, C)`; all of it where there is no mask."""
    return x if valid is None else x.movedim(1, -1)[valid]
