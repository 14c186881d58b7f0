"""Give a class that computes its batch norm itself, as class-conditional ones do, a BatchNorm that can be swapped."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NetworkError, OptionError
from .batch import BY_DIMS

NAME = "norm"


class SplitNorm(nn.Module):
    """Of a class that computes `F.batch_norm` itself: its own forward, on what its child `norm` has normalized.

    Its own statistics are a mean of 0 and a variance of `1 - eps` for good, with which batch norm changes nothing.
    """

    norm: nn.Module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In eval mode for the class itself, which would take the statistics of the batch; `norm` has done that."""
        training, self.training = self.training, False
        try:
            return super().forward(self.norm(x), *args, **kwargs)
        finally:
            self.training = training


def split_norm(
    model: nn.Module, cls: type[nn.Module], *, mean: str = "running_mean", var: str = "running_var", dims: int = 2
) -> int:
    """Split modules of a class that computes `F.batch_norm` itself, such as class-conditional ones; in place.

    For `y = F.batch_norm(x, mean, var, ...) * gamma(condition) + beta(condition)`, as in BigGAN. Each gets a child
    `norm`, a BatchNorm without gamma and beta that holds the statistics, and computes what it did, in training mode
    too; all else of it stays, and so do its parameters' names. `convert`, `calibrate`, `save` and `revert` then treat
    `norm` like any other; `load` wants a `model` that is split too.

    mean, var: the names of its buffers `(C,)`. dims: spatial dimensions of its input. `eps` is its attribute of that
    name, or 1e-5, and so is `momentum`, or 0.1. Returns how many were split. Raises NetworkError, and changes nothing,
    where there are none or one does not hold that, OptionError for other values than these.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise OptionError(f"cls: expected a class of torch.nn.Module, got {cls!r}")
    if dims not in BY_DIMS:
        raise OptionError(f"dims: expected 1, 2 or 3, got {dims!r}")
    found = {name: module for name, module in model.named_modules() if type(module) is cls}
    if not found:
        raise NetworkError(f"{type(model).__name__} has no module of the class {cls.__name__}")
    for name, module in found.items():
        if reason := _misfit(module, mean, var):
            raise NetworkError(f"{name or '(root)'} ({cls.__name__}) cannot be split: {reason}")
    for module in found.values():
        _split(module, mean, var, dims)
    return len(found)


def _misfit(module: Any, mean: str, var: str) -> str:
    tensors = [module._buffers.get(name) for name in (mean, var)]
    if any(t is None or t.dim() != 1 for t in tensors) or tensors[0].shape != tensors[1].shape:
        return f"its buffers {mean} and {var} are not one value a channel each"
    if hasattr(module, NAME):
        return f"it has something named {NAME} already"
    return ""


def _split(module: Any, mean: str, var: str, dims: int) -> None:
    eps, momentum = float(getattr(module, "eps", 1e-5)), getattr(module, "momentum", 0.1)
    held = [module._buffers.pop(name) for name in (mean, var)]
    norm: Any = BY_DIMS[dims](held[0].numel(), eps, momentum, affine=False).to(held[0].device)
    norm._buffers["running_mean"], norm._buffers["running_var"] = held
    norm.training = module.training
    cls: Any = type(module)
    module.__class__ = _split_class(cls, mean, var)
    module.add_module(NAME, norm)
    module.register_buffer("_zeros", torch.zeros_like(held[0]), persistent=False)
    module.register_buffer("_ones", torch.full_like(held[1], 1 - eps), persistent=False)


@functools.cache
def _split_class(cls: type[nn.Module], mean: str, var: str) -> type[nn.Module]:
    """The class with a norm of its own; under the same name, as what it is to all others."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    stand_ins = {mean: property(lambda self: self._zeros), var: property(lambda self: self._ones)}
    return type(cls.__name__, (SplitNorm, cls), {**names, **stand_ins})
