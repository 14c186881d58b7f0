"""The shapes of what reaches each norm, from runs on inputs that somebody gave or that were guessed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..modules.restore import trial_run
from .example_inputs import guess_inputs

Shapes = dict[str, list[tuple[int, ...]]]


def shapes_of(model: nn.Module, inputs: tuple[Any, ...], layers: Mapping[nn.Module, str]) -> Shapes | None:
    """The shape of the first tensor of each call of each layer in a run in eval mode; None if the network cannot run.

    layers: modules and their paths. Leaves the model and the random state as they were.
    """
    seen: Shapes = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        seen.setdefault(layers[module], []).extend(tuple(t.shape) for t in tensors[:1])

    try:
        with ExitStack() as stack:
            stack.enter_context(trial_run(model))
            for module in layers:
                stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
            model(*inputs)
    except Exception:  # a stranger's forward raises whatever it likes on inputs it was not made for
        return None
    return seen


def positions_by_guess(model: nn.Module, layers: Mapping[nn.Module, str]) -> dict[str, int]:
    """How many positions each layer is given at least, on guessed inputs; nothing for layers that they do not reach.

    A map that is one position wide may be so because the guess is small: an input four times as large then decides,
    where the network takes one.
    """
    inputs = guess_inputs(model)
    found = None if inputs is None else shapes_of(model, inputs, layers)
    if inputs is None or found is None:
        return {}
    positions = fewest(found)
    if 1 in positions.values() and (larger := shapes_of(model, _enlarged(inputs), layers)) is not None:
        positions |= fewest(larger)
    return positions


def vectors_only(
    model: nn.Module, inputs: tuple[Any, ...] | None, layers: Mapping[nn.Module, str], channels: Iterable[int]
) -> Collection[str]:
    """Those of the layers that get `(N, C)`, and nothing else, however many dimensions the network's input has.

    A linear layer computes along the last dimension, whichever that is, while a norm's channels are the second: with
    an input of one more dimension, as wide as the layers have channels, the same network may normalize along another
    one. Without inputs, no layer is sure.
    """
    if inputs is None:
        return ()
    given = [inputs, *(_raised(inputs, width, at) for width in sorted(set(channels)) for at in _places(inputs))]
    runs = [shapes_of(model, each, layers) for each in given]
    known = [run for run in runs if run is not None]
    return [p for p in layers.values() if runs[0] and runs[0].get(p) and all(_vectors(run.get(p, [])) for run in known)]


def _vectors(shapes: list[tuple[int, ...]]) -> bool:
    return all(len(shape) == 2 for shape in shapes)


def fewest(shapes: Shapes) -> dict[str, int]:
    """The positions of the smallest map that each layer was given."""
    return {path: min(math.prod(shape[2:]) for shape in seen) for path, seen in shapes.items() if seen}


def _enlarged(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return _mapped(lambda x: x.repeat(1, 1, *[4] * (x.dim() - 2)) if x.dim() > 2 else x, inputs)


def _places(inputs: tuple[Any, ...]) -> tuple[int, ...]:
    """Where another dimension can stand: after the batch, and before the last."""
    return (1, 2) if any(isinstance(x, Tensor) and x.dim() == 3 for x in pytree.tree_leaves(inputs)) else (1,)


def _raised(inputs: tuple[Any, ...], width: int, at: int) -> tuple[Any, ...]:
    """With one more dimension, of that width, there, or before the last."""

    def raised(x: Tensor) -> Tensor:
        if x.dim() not in (2, 3) or not x.is_floating_point():
            return x
        place = min(at, x.dim() - 1)
        return x.unsqueeze(place).expand(*x.shape[:place], width, *x.shape[place:])

    return _mapped(raised, inputs)


def _mapped(change: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    changed: tuple[Any, ...] = pytree.tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, inputs)
    return changed
