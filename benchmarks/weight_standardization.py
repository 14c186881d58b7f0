"""Weight-standardised convolutions in front of group norms: Qiao et al. 2019, Kolesnikov et al. 2019 ("BiT").

`w = gain * (v - mean(v)) / std(v)` for each filter, the gain being the filter's own deviation, so that a network starts
as it was but for the mean of each filter, which `calibrate` takes up. What finetuning.py measures as `gn, ws`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.conversion.stabilize import factors_of, folded_weights, rescale

_TINY = 1e-12


class Standardized(nn.Module):
    """A weight `(C, ...)` with mean 0 and deviation `gain` `(C, 1, ...)` over each output channel."""

    gain: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.dims = tuple(range(1, weight.dim()))
        self.register_buffer("gain", weight.detach().std(self.dims, correction=0, keepdim=True))

    def forward(self, v: Tensor) -> Tensor:
        var, mean = torch.var_mean(v, self.dims, correction=0, keepdim=True)
        return self.gain * (v - mean) * torch.rsqrt(var + _TINY)


def _layers(model: nn.Module, *, dense: bool) -> list[nn.Module]:
    """The folded convolutions; dense: without those of one input channel a filter."""
    weights = {id(weight) for weight in folded_weights(model)}
    found = [m for m in model.modules() if isinstance(m, nn.Conv2d) and id(m._parameters.get("weight")) in weights]
    return [m for m in found if not (dense and m.weight.shape[1] == 1)]


@torch.no_grad()
def centre_filters(model: nn.Module, *, dense: bool) -> None:
    """Take the mean out of each filter."""
    for layer in _layers(model, dense=dense):
        layer.weight.sub_(layer.weight.mean(tuple(range(1, layer.weight.dim())), keepdim=True))


def standardize(model: nn.Module, *, dense: bool) -> None:
    """Reparametrise the folded convolutions, at the size that `stabilized` trains them at."""
    rescale(model, factors_of(model))
    for layer in _layers(model, dense=dense):
        parametrize.register_parametrization(layer, "weight", Standardized(layer.weight))
