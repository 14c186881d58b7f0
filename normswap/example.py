"""Example inputs for a network nobody gave any for: a guess from its first layers, tried out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .surgery import device_and_dtype, evaluating, undisturbed

_SIDE = 160


def guess_inputs(model: nn.Module) -> tuple[Any, ...] | None:
    """Random inputs that `model(*inputs)` runs on in eval mode, or None when no guess does.

    Images `(1, C, 64, 64)` (then larger), clips `(1, C, 16, 64, 64)`, sequences `(1, C, 256)` or vectors `(2, C)`,
    with C from the first layer; torchvision's detectors get a list of images. A forward of several arguments gets the
    same for each. The same input each time.
    """
    for inputs in _candidates(model):
        if runs(model, inputs):
            return inputs
    return None


def runs(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether the model's forward takes these inputs. Leaves the model and the random state as they were."""
    try:
        with evaluating(model), undisturbed(model), torch.no_grad():
            shrink_images(model)
            model(*inputs)
    except Exception:  # a stranger's forward raises whatever it likes on inputs it was not made for
        return False
    return True


def shrink_images(model: nn.Module) -> None:
    """Let a detector of torchvision work on small images, where it would enlarge them to 800 pixels and more.

    For a caller within `undisturbed`, which puts the sizes back.
    """
    transform: Any = getattr(model, "transform", None)
    if _is_detector(model) and not transform.fixed_size:
        transform.min_size = tuple(min(side, _SIDE) for side in transform.min_size)
        transform.max_size = min(transform.max_size, 2 * _SIDE)


def _is_detector(model: nn.Module) -> bool:
    return type(getattr(model, "transform", None)).__name__ == "GeneralizedRCNNTransform"


def random_tensor(shape: tuple[int, ...], model: nn.Module) -> torch.Tensor:
    """Standard normal values of `shape`, on the model's device and in its dtype, from a fixed seed."""
    device, dtype = device_and_dtype(model)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(device=device, dtype=dtype)


def _candidates(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    first = next((m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))), None)
    if first is None:
        for shape in _shapes_of_norm(model):
            yield (random_tensor(shape, model),)
        return
    if isinstance(first, nn.Linear):
        yield (random_tensor((2, first.in_features), model),)
        return
    spatial = len(first.kernel_size)
    sizes: dict[int, list[tuple[int, ...]]] = {
        1: [(256,), (4096,)],
        2: [(64, 64), (224, 224), (256, 256), (299, 299), (32, 32)],
    }
    sizes[3] = [(16, 64, 64), (16, 112, 112), (16, 224, 224)]
    if _is_detector(model):
        yield ([random_tensor((first.in_channels, 128, 160), model).sigmoid()],)
    for size in sizes[spatial]:
        yield (random_tensor((1, first.in_channels, *size), model),) * _required_arguments(model)


def _required_arguments(model: nn.Module) -> int:
    """How many arguments the forward must be given; the same input serves for each (two frames, two views)."""
    empty = inspect.Parameter.empty
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return max(1, sum(p.default is empty and p.kind in named for p in parameters))


def _shapes_of_norm(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """For networks of norms and activations alone."""
    counts = (getattr(m, name, 0) for m in model.modules() for name in ("num_features", "num_channels"))
    channels = next((int(count) for count in counts if count), None)
    if channels is not None:
        for size in ((8, 8), (8,), (4, 8, 8), ()):
            yield (2, channels, *size)
