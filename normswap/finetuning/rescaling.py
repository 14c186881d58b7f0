"""Folded layers at the size that their weights had before, for the time of a training.

Folding divides a layer's weights by the deviation of each channel. The network computes the same, but gradients grow
by the factor by which weights shrink, so that a learning rate is worth its square: rates that suited the original
wreck the converted network. A norm that follows its sample does not notice `(W, b)` times c if its `eps` is taken
times c^2. With c a power of two, both are exact in floating point, back and forth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion import record_of
from ..planning import Step
from ..surgery import get
from ..transfer import inner_norm
from ..undo import by_output_channel

_LIMIT = 2.0**10
_TINY = 1e-30


@torch.no_grad()
def factors_of(model: nn.Module) -> dict[str, float]:
    """For each converted norm by its path, the power of two that brings the layers before it nearest to their old norm.

    Norms with running statistics, and all norms of a network that keeps no undo record, are left out.
    """
    record = record_of(model)
    if record is None or not record.undo.complete:
        return {}
    scales = {layer.path: layer.scale for layer in record.undo.layers}
    found = {}
    for step in record.plan.steps:
        if not _applies(model, step) or not all(path in scales for path in step.producers):
            continue
        now = before = 0.0
        for path in step.producers:
            layer: Any = get(model, path)
            weight = layer.weight.double()
            scale = by_output_channel(layer, scales[path].to(weight)).abs().clamp_min(_TINY)
            now += float(weight.square().sum())
            before += float((weight / scale).square().sum())
        if now > 0 and 0 < before < math.inf:
            factor = 2.0 ** round(math.log2(math.sqrt(before / now)))
            found[step.path] = min(max(factor, 1 / _LIMIT), _LIMIT)
    return {path: factor for path, factor in found.items() if factor != 1}


@torch.no_grad()
def rescale(model: nn.Module, factors: Mapping[str, float], *, back: bool = False, values: bool = True) -> None:
    """Multiply weight and bias of the layers before each norm by its factor, and its `eps` by the square; in place.

    values=False leaves weights and biases, which come from elsewhere.
    """
    record = record_of(model)
    if record is None:
        return
    for step in record.plan.steps:
        factor = factors.get(step.path, 1.0)
        if factor == 1:
            continue
        factor = 1 / factor if back else factor
        for path in step.producers if values else ():
            layer: Any = get(model, path)
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)
        norm: Any = inner_norm(get(model, step.path))
        norm.eps = norm.eps * factor**2


@contextmanager
def rescaled(model: nn.Module, *, wanted: bool) -> Iterator[dict[str, float]]:
    """With the factors of `factors_of` applied, and taken back at the end. Yields them; none where not wanted."""
    factors = factors_of(model) if wanted else {}
    rescale(model, factors)
    try:
        yield factors
    finally:
        rescale(model, factors, back=True)


def folded_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the layers that feed norms which follow their sample, those that `centralize` is for."""
    record = record_of(model)
    steps = [] if record is None else [step for step in record.plan.steps if _applies(model, step)]
    layers: list[Any] = [get(model, path) for step in steps for path in step.producers]
    return [layer.weight for layer in layers if layer.weight.dim() > 1 and layer.weight[0].numel() > 1]


def centralize(gradient: Tensor) -> None:
    """Take the mean over each output channel's weights out of the gradient `(C, ...)`, in place.

    Inputs that are positive, as behind a ReLU, let every step shift the mean of whole channels. A BN takes this shift
    out again; a norm over groups of channels does not. Source: Yong et al. 2020, "Gradient Centralization".
    """
    gradient.sub_(gradient.mean(dim=tuple(range(1, gradient.dim())), keepdim=True))


def _applies(model: nn.Module, step: Step) -> bool:
    norm: Any = inner_norm(get(model, step.path))
    follows = norm._buffers.get("running_mean") is None and isinstance(getattr(norm, "eps", None), float)
    return step.transfer == "fold" and bool(step.producers) and follows
