"""Adaptive InstanceNorm (`adain`). Huang and Belongie 2017, "Arbitrary Style Transfer in Real-time with AdaIN"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import Fix, NetworkError, Text
from ._building import with_affine
from .registry import register
from .spec import NormSpec, NormState, Options

Style = tuple[Tensor, Tensor]
"""Scale and shift, `(N, C)` each, or `(1, C)` for all samples of a batch alike."""


class AdaptiveInstanceNorm(nn.Module):
    """`y = scale * (x - mean_c) / sqrt(var_c + eps) + shift`, mean_c and var_c of the channel in the sample.

    Input and output `(N, C, *)`. scale and shift are those of a style: given with the call, else of `style`, else, with
    neither, gamma and beta, with which it is an InstanceNorm. `normswap.styled` sets `style` throughout a network.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.num_features, self.eps, self.affine = num_features, eps, affine
        self.style: Style | None = None
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if affine else None)

    def forward(self, x: Tensor, style: Tensor | Style | None = None) -> Tensor:
        """style: features `(N, C, *)` whose deviation and mean are scale and shift, or these two."""
        given = self.style if style is None else style
        if given is None:
            return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        scale, shift = style_of(given, self.eps) if isinstance(given, Tensor) else given
        shape = (-1, x.shape[1], *[1] * (x.dim() - 2))
        return F.instance_norm(x, eps=self.eps) * scale.to(x.dtype).view(shape) + shift.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


def style_of(features: Tensor, eps: float = 1e-5) -> Style:
    """Of `(N, C, *)`: the deviation `sqrt(var + eps)` and the mean over positions, `(N, C)` each."""
    var, mean = torch.var_mean(features.flatten(2), 2, correction=0)
    return (var + eps).sqrt(), mean


@contextmanager
def styled(model: nn.Module, *inputs: Any) -> Iterator[nn.Module]:
    """Within it, the `adain` norms of a network give what they normalize the style of other inputs.

        with normswap.styled(model, painting):
            picture = model(photograph)

    inputs: the arguments of its forward, of one sample, or of as many as it will then run on. The network runs on them
    once, in which each `adain` hands on what it reads (a sample in its own style) and notes its mean and deviation.
    Gradients flow into that run, unless under `torch.no_grad()`. Raises NetworkError for a network without `adain`.
    """
    norms = [module for module in nn.Module.modules(model) if isinstance(module, AdaptiveInstanceNorm)]
    if not norms:
        raise NetworkError(
            f"{type(model).__name__} has no adain norm", hint=Text("Convert it: ", Fix("to", "adain"), ".")
        )
    before = [norm.style for norm in norms]
    found: dict[nn.Module, Style] = {}

    def note(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        found[module] = style_of(args[0], module.eps)
        return args[0]

    hooks = [norm.register_forward_hook(note, prepend=True) for norm in norms]
    try:
        try:
            model(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        for norm in norms:
            norm.style = found.get(norm)
        yield model
    finally:
        for norm, style in zip(norms, before, strict=True):
            norm.style = style


def _read(module: Any) -> NormState:
    return NormState(
        channels=module.num_features,
        eps=module.eps,
        weight=module.weight,
        bias=module.bias,
        training=module.training,
    )


def _build(state: NormState, options: Options) -> nn.Module:
    module = AdaptiveInstanceNorm(state.channels, 1e-5 if options.eps is None else options.eps, affine=False)
    module.affine = state.affine
    return with_affine(module, state)


register(
    NormSpec(
        name="adain",
        title="Adaptive InstanceNorm",
        formula="y = (x - mean_c) / sqrt(var_c + eps) * scale + shift, both of a style's features; without one, as in",
        axes="positions, per sample and channel",
        source="Huang and Belongie 2017",
        read=_read,
        build=_build,
        aliases=("adaptiveinstancenorm",),
        classes=(AdaptiveInstanceNorm,),
        attributes=("num_features", "style"),
        groups=lambda state, options: state.channels,
        exact_from=("in", "adain"),
        elements=lambda channels, positions, options: positions,
    )
)
