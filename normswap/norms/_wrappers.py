"""The two modules a swap may need beside the norm itself: a fixed per-channel map, and a sequence around the norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .spec import NormState


def per_channel(vector: Tensor, ndim: int) -> Tensor:
    """View a `(C,)` vector so that it broadcasts over `(N, C, *)` with `ndim` dimensions."""
    return vector.view(1, -1, *([1] * (ndim - 2)))


class ChannelAffine(nn.Module):
    """`y = scale * x + shift` per channel, on `(N, C, *)` of any dimensionality.

    As the *prescale* of a norm, scale and shift are buffers; they standardise each channel with the BN's running
    statistics where no single layer feeds the norm. As the remainder of a fused BN they are parameters.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, *, trainable: bool = False) -> None:
        super().__init__()
        if trainable:
            self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)
        else:
            self.register_buffer("scale", scale)
            self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = per_channel(self.scale, x.dim()), per_channel(self.shift, x.dim())
        return torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.scale.numel()}"


class NormSequence(nn.Sequential):
    """A norm with what belongs to it: `standardize` before, `drop`, `act`, `aa` after, whichever exist.

    Children keep the names a fused layer uses, so `layer.act` still works; `weight` and `bias` are the norm's.
    """

    def __init__(self, norm: nn.Module, *, standardize: nn.Module | None, tail: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if standardize is not None:
            self.add_module("standardize", standardize)
        self.add_module("norm", norm)
        for name, module in tail.items():
            self.add_module(name, module)
        self.training = norm.training

    @property
    def weight(self) -> Tensor | None:
        """The norm's per-channel weight (gamma), `(C,)`."""
        return getattr(self.norm, "weight", None)

    @property
    def bias(self) -> Tensor | None:
        """The norm's per-channel bias (beta), `(C,)`."""
        return getattr(self.norm, "bias", None)


def wrapped(
    norm: nn.Module,
    state: NormState,
    standardize: tuple[Tensor, Tensor] | None,
    sequence: type[NormSequence] = NormSequence,
) -> nn.Module:
    """A norm with what a fused layer runs after it, and with a fixed scale and shift `(C,)` before it, if there are."""
    if standardize is None and not state.tail:
        return norm
    first = None
    if standardize is not None:
        dtype = state.statistics[1].dtype
        first = ChannelAffine(*(t.to(dtype) for t in standardize))
        first.training = state.training
    return sequence(norm, standardize=first, tail=state.tail)
