"""Example inputs for a network nobody gave any for: a guess from its first layers, tried out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from ..modules.restore import is_detector, trial_run
from ..modules.tree import device_and_dtype


def guess_inputs(model: nn.Module) -> tuple[Any, ...] | None:
    """Random inputs that `model(*inputs)` runs on in eval mode, or None when no guess does.

    Images `(1, C, 64, 64)`, clips or volumes `(1, C, 16, 64, 64)`, sequences `(1, C, 256)`, vectors `(2, C)` or a few
    of them `(2, 16, C)`, with C from the first layer; numbers of words `(2, 16)` for an embedding. Then the size that
    the network's configuration names (timm's `pretrained_cfg`, transformers' `config`), other usual sizes, sound
    `(1, 16000)`, half a minute at 100 Hz `(1, 1, 3000)` and spectrograms `(1, 64, 80)`. torchvision's detectors get a
    list of images. A forward of several arguments gets the same for each.
    The same input each time.
    """
    for inputs in _candidates(model):
        if runs(model, inputs):
            return inputs
    return None


def runs(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether the model's forward takes these inputs. Leaves the model and the random state as they were."""
    try:
        with trial_run(model):
            model(*inputs)
    except Exception:  # a stranger's forward raises whatever it likes on inputs it was not made for
        return False
    return True


def inputs_for(model: nn.Module, example_inputs: Any) -> tuple[Any, ...] | None:
    """The forward's positional arguments: those that the caller gave, else a guess; None where no guess does."""
    return guess_inputs(model) if example_inputs is None else as_inputs(example_inputs)


def as_inputs(example_inputs: Any) -> tuple[Any, ...]:
    """The forward's positional arguments from what callers pass as `example_inputs`."""
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def tensors_given(example_inputs: Any) -> int:
    """How many tensors the forward's arguments begin with, in what callers pass as `example_inputs`; 0 of None."""
    return len(list(takewhile(lambda value: isinstance(value, torch.Tensor), as_inputs(example_inputs))))


def random_tensor(shape: tuple[int, ...], model: nn.Module) -> torch.Tensor:
    """Standard normal values of `shape`, on the model's device and in its dtype, from a fixed seed."""
    return _normal(shape, *device_and_dtype(model))


def _normal(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(device=device, dtype=dtype)


def _candidates(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    device, dtype = device_and_dtype(model)
    firsts = _first_layers(model)
    if not firsts:
        for shape in _shapes_of_norm(model):
            yield (_normal(shape, device, dtype),)
        return
    if is_detector(model):
        yield ([_normal((firsts[0].in_channels, 128, 160), device, dtype).sigmoid()],)
    times = _required_arguments(model)
    for layer in firsts:
        if isinstance(layer, nn.Embedding):
            words = torch.randint(layer.num_embeddings, (2, 16), generator=torch.Generator().manual_seed(0))
            yield (words.to(device),) * times
        else:
            for shape in _shapes_for(layer, _named_size(model)):
                yield (_normal(shape, device, dtype),) * times
    if any(getattr(layer, "in_channels", 0) == 1 for layer in firsts):  # signals that the network makes a map of itself
        for shape in ((1, 16000), (1, 1, 16000), (1, 48000), (1, 1, 3000), (1, 64, 80)):
            yield (_normal(shape, device, dtype),) * times


def _first_layers(model: nn.Module) -> list[Any]:
    """The first layer of each kind that can be the network's first, in the order of the modules."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.RNNBase)
    firsts = {kind: next((m for m in nn.Module.modules(model) if isinstance(m, kind)), None) for kind in kinds}
    order = list(nn.Module.modules(model))
    return sorted((m for m in firsts.values() if m is not None), key=order.index)


def _shapes_for(layer: Any, named: tuple[int, ...] | None) -> list[tuple[int, ...]]:
    """Shapes that networks with such a first layer take, the likeliest first. named: by the configuration."""
    if isinstance(layer, nn.RNNBase):
        return [(2, 16, layer.input_size)]
    if isinstance(layer, nn.Linear):
        count = layer.in_features
        squares = [(2, c, math.isqrt(count // c), math.isqrt(count // c)) for c in (1, 3)]
        return [(2, count), (2, 16, count), *(s for s in squares if math.prod(s) == 2 * count)]
    shapes = [(1, layer.in_channels, *size) for size in _SIZES[len(layer.kernel_size)]]
    return (
        shapes if named is None or len(named) != len(layer.kernel_size) + 1 else [shapes[0], (1, *named), *shapes[1:]]
    )


_SIZES: dict[int, list[tuple[int, ...]]] = {
    1: [(256,), (4096,), (16000,), (1000,), (64,), (48000,)],
    2: [
        (64, 64),
        (224, 224),
        (256, 256),
        (299, 299),
        (32, 32),
        (28, 28),
        (96, 96),
        (128, 128),
        (384, 384),
        (16, 16),
        (8, 8),
        (256, 128),  # persons
        (160, 64),
    ],
    3: [(16, 64, 64), (16, 112, 112), (16, 224, 224), (32, 32, 32), (64, 64, 64), (96, 96, 96)],
}


def _named_size(model: nn.Module) -> tuple[int, ...] | None:
    """`(C, H, W)` by the configuration that timm or transformers gave the network."""
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if config is not None:
        size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        return _numbers(size)
    config = getattr(model, "config", None)
    side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    return _numbers((channels, side, side) if isinstance(side, int) else (channels, *side) if side else None)


def _numbers(size: Any) -> tuple[int, ...] | None:
    known = isinstance(size, (list, tuple)) and all(isinstance(n, int) and n > 0 for n in size)
    return tuple(size) if known else None


def _required_arguments(model: nn.Module) -> int:
    """How many arguments the forward must be given; the same input serves for each (two frames, two views)."""
    empty = inspect.Parameter.empty
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return max(1, sum(p.default is empty and p.kind in named for p in parameters))


def _shapes_of_norm(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """For networks of norms and activations alone."""
    counts = (getattr(m, name, 0) for m in nn.Module.modules(model) for name in ("num_features", "num_channels"))
    channels = next((int(count) for count in counts if count), None)
    if channels is not None:
        for size in ((8, 8), (8,), (4, 8, 8), ()):
            yield (2, channels, *size)
