"""How far a conversion will move a network's outputs, told from its weights alone, before any image is seen.

Coloured noise runs through the network twice. In both runs each norm's input is standardised by what the noise causes
there, which is what folding does with the images of the training; in the second, each group norm then takes mean and
variance of its own groups. gamma, beta, weights, depth, residual branches and the size of the maps do the rest: what
lies between the two outputs is what following the sample does to this network. No constant is fitted.

`benchmarks/advising.py` compares it with the drift that real images show.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.fit import remembering
from ..calibration.norm_targets import first_input, state_of, statistics_of
from ..calibration.stand_ins import noise
from ..comparison.outputs import floating
from ..inspection.example_inputs import as_inputs
from ..inspection.inventory import Layer
from ..modules.restore import trial_run
from ..modules.tree import device_and_dtype
from ..norms.registry import build
from ..norms.spec import NormSpec, Options

INPUTS = 16
_TINY = 1e-12

Swap = Mapping[str, Callable[[Tensor], Tensor]]
"""What each norm that is to change becomes, by path: a function of its standardised input, without gamma and beta."""
Statistics = dict[str, list[tuple[Tensor, Tensor]]]


def bare_norm(layer: Layer, target: NormSpec, options: Options) -> Callable[[Tensor], Tensor]:
    """What a layer is to become, without gamma and beta; with a chosen eps, at the gain that goes with it."""
    bare = replace(layer.state, weight=None, bias=None, running_mean=None, running_var=None, tail={})
    norm = build(target, bare, options).eval()
    gain = math.sqrt(1 + (options.eps or 0.0))
    return lambda x: norm(x) * gain


def noise_for(model: nn.Module, inputs: tuple[Any, ...] | None, count: int = INPUTS) -> tuple[Tensor, ...] | None:
    """So many inputs of the shapes of `inputs`: noise of spectrum 1/f, or random indices for whole numbers.

    None where the network takes something else, such as a detector's list of images.
    """
    if inputs is None or not all(isinstance(x, Tensor) and x.dim() > 1 for x in as_inputs(inputs)):
        return None
    device, dtype = device_and_dtype(model)
    draw = torch.Generator().manual_seed(0)
    found = []
    for x in as_inputs(inputs):
        if x.is_floating_point():
            like = torch.randn(2, *x.shape[1:], generator=draw)
            found.append(noise(count, like, 0).to(device, dtype))
        else:
            found.append(torch.randint(int(x.max()) + 1, (count, *x.shape[1:]), generator=draw).to(device, x.dtype))
    return tuple(found)


def expected_drift(model: nn.Module, swaps: Sequence[Swap], inputs: tuple[Tensor, ...]) -> list[float | None]:
    """The drift that each of the swaps is expected to cause; None where no output compares. Changes nothing.

    `|a - b| / sqrt((|a|^2 + |b|^2) / 2)` of the two runs' outputs, less the mean of the first over the inputs: what
    tells inputs apart. inputs: of the network's forward, from `noise_for`.
    """
    norms = remembering(model)
    statistics: Statistics = defaultdict(list)
    with trial_run(model):
        original = _run(model, norms, {}, statistics, inputs)
        return [_apart(original, _run(model, norms, swap, statistics, inputs)) for swap in swaps]


def _run(
    model: nn.Module, norms: Mapping[str, nn.Module], swap: Swap, statistics: Statistics, inputs: tuple[Tensor, ...]
) -> Any:
    """The outputs with standardised norms. The first run notes the statistics of each call, later ones take them."""
    known = {path: iter(calls) for path, calls in statistics.items()}

    def hook_for(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = first_input(args, kwargs)
            call = next(known[path], None) if path in known else None
            if call is None:
                var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0, keepdim=True)
                statistics[path].append((mean, var))
            else:
                mean, var = call
            x = (x - mean) / (var + _TINY).sqrt()
            x = swap[path](x) if path in swap else x
            state, (kept, spread) = state_of(module), statistics_of(module)
            shape = (1, -1, *[1] * (x.dim() - 2))  # the norm's own arithmetic then leaves gamma x + beta
            x = (x * (spread + state.eps).sqrt().view(shape) + kept.view(shape)).to(first_input(args, kwargs).dtype)
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})

        return hook

    with ExitStack() as stack:
        for path, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(hook_for(path), with_kwargs=True).remove)
        return model(*inputs)


def _apart(a: Any, b: Any) -> float | None:
    squares = torch.zeros(3, dtype=torch.float64)
    one, other = floating(a), floating(b)
    for name, first in one.items():
        if name not in other or other[name].shape != first.shape:
            return None
        centre = first.double().mean(0, keepdim=True)
        first, second = first.double() - centre, other[name].double() - centre
        squares += torch.stack([t.square().sum() for t in (first - second, first, second)]).cpu()
    gap, size = float(squares[0]), float(squares[1:].sum()) / 2
    return math.sqrt(gap / size) if size > 0 and math.isfinite(gap / size) else None
