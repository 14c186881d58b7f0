"""What wraps a network (DataParallel, torch.compile, DistributedDataParallel): the network in it, and a new wrapper.

A wrapper hides the network's code from a trace and puts a prefix before every name, so work is done on what it holds.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from torch import nn

from ..errors import OptionError

_CHILD = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
}
# Classes of other libraries that are modules by name only: their forward predicts, and copies, fuses and caches.
_HOLDERS = {"ultralytics.engine.model.Model": "model"}
_HOLD_PARAMETERS = ("DistributedDataParallel", "FullyShardedDataParallel")


def check_module(model: Any, name: str = "model") -> None:
    """Raise OptionError for what is no network, such as its name."""
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__}
    for child in (_HOLDERS[name] for name in names & _HOLDERS.keys()):
        raise OptionError(
            f"{type(model).__name__} is what trains and runs a network, not a network itself",
            hint=f"Give the one that it holds: {name}.{child}; a converted one takes its place: {name}.{child} = ... "
            "Its train() would build another network: `normswap recipes ultralytics_trainer` shows the way.",
        )
    if not isinstance(model, nn.Module):
        hint = "normswap.load(file) gives the network of a file." if isinstance(model, (str, os.PathLike)) else None
        raise OptionError(f"{name}: expected a torch.nn.Module, got {type(model).__name__}", hint=hint)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network within all wrappers; itself where there is none. Raises OptionError for what is no network."""
    check_module(model)
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    """Told by name and origin, because importing the class of compiled modules takes a second."""
    ours = type(model).__module__.startswith("torch.")
    child = _CHILD.get(type(model).__name__)
    return model._modules[child] if ours and child is not None else None


def check_wrapper(model: nn.Module) -> None:
    """Raise OptionError for what is no network, and for a wrapper set up for the very parameters that it had then."""
    check_module(model)
    wrapper: nn.Module | None = model
    while wrapper is not None:
        name = type(wrapper).__name__
        if _inner(wrapper) is not None and name in _HOLD_PARAMETERS:
            raise OptionError(
                f"{name} was set up for the parameters that the network has now, and would miss new ones",
                hint=f"Convert or revert what is within, and wrap the result: {name}(normswap.convert(network, ...))",
            )
        wrapper = _inner(wrapper)


def rewrapped(wrapper: nn.Module, root: nn.Module, *, inplace: bool) -> nn.Module:
    """`root`, which came of the network within `wrapper`, in a wrapper of the same kind and settings.

    inplace: in `wrapper` itself, where it can take another network.
    """
    inner = _inner(wrapper)
    if inner is None:
        return root
    new = rewrapped(inner, root, inplace=inplace)
    if new is inner:
        return wrapper
    compiled: Any = getattr(wrapper, "dynamo_ctx", None)
    if compiled is not None:  # it keeps the forward of the network that it was made for
        return compiled(new)
    if inplace:
        wrapper._modules[_CHILD[type(wrapper).__name__]] = new
        return wrapper
    return copy.deepcopy(wrapper, {id(inner): new})
