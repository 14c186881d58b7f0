"""Walk a module tree with all its aliases, and replace modules by path. Knows nothing about norms."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .errors import NormswapError

# What every nn.Module carries; anything else in a module's __dict__ is its own or its user's.
_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)
_HOOK_ATTRIBUTES = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks") or "_hooks_" in name)


def aliases(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module of the tree with all the paths it is reachable by, in traversal order; the root's is ''."""
    found: dict[nn.Module, list[str]] = {}
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        found.setdefault(module, []).append(path)
        prefix = f"{path}." if path else ""
        stack.extend((prefix + name, child) for name, child in reversed(module._modules.items()) if child is not None)
    return found


def get(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; '' is the root. Raises KeyError when there is none."""
    for name in path.split(".") if path else ():
        child = model._modules.get(name)
        if child is None:
            raise KeyError(path)
        model = child
    return model


def replace(model: nn.Module, paths: Iterable[str], new: nn.Module) -> nn.Module:
    """Put `new` at every path; returns the root, which is `new` itself when the root was replaced.

    Writes into the parent's table of children, so that a parent whose `add_module` or `__setattr__` is overridden
    cannot interfere, and the order of children stays.
    """
    for path in paths:
        if path == "":
            return new
        parent_path, _, name = path.rpartition(".")
        parent = get(model, parent_path)
        if name not in parent._modules:
            raise KeyError(path)
        parent._modules[name] = new
    return model


def adopt(new: nn.Module, old: nn.Module, *, known: frozenset[str] = frozenset()) -> None:
    """Give `new` what users attached to `old`: hooks and extra attributes.

    Hook tables are handed over as the same objects, so that `handle.remove()` keeps working. Attributes that `new`
    has itself, that are in `known`, or that belong to the old class are left out.
    """
    for name in _HOOK_ATTRIBUTES:
        if old.__dict__.get(name):
            new.__dict__[name] = old.__dict__[name]
    for name, value in old.__dict__.items():
        if name not in _MODULE_ATTRIBUTES and name not in known and name not in new.__dict__:
            new.__dict__[name] = value


def matches(pattern: str, path: str) -> bool:
    """Whether a rule's pattern covers a path: shell wildcards over the dotted path, or a module and all below it."""
    return fnmatch.fnmatchcase(path, pattern) or path == pattern or path.startswith(pattern + ".")


@contextmanager
def evaluating(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Run with every module in eval (or train) mode; each module's own flag is restored."""
    flags = [(module, module.training) for module in model.modules() if module.training != training]
    for module, _ in flags:
        module.training = training
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass leaves behind on the modules themselves: attributes, buffers, random state."""
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        try:
            yield
        finally:
            for module, attributes, buffers in before:
                if module.__dict__.keys() != attributes.keys() or any(
                    module.__dict__[name] is not value for name, value in attributes.items()
                ):
                    module.__dict__.clear()
                    module.__dict__.update(attributes)
                if module._buffers.keys() != buffers.keys() or any(
                    module._buffers[name] is not value for name, value in buffers.items()
                ):
                    module._buffers.clear()
                    module._buffers.update(buffers)


def _cuda_devices(model: nn.Module) -> list[int]:
    first = next(model.parameters(), None)
    return [first.device.index or 0] if first is not None and first.device.type == "cuda" else []


def hidden_references(model: nn.Module, wanted: set[nn.Module]) -> list[tuple[str, str]]:
    """Places outside the tables of children that hold a wanted module: (path of the holder, attribute).

    A module kept in a plain list or dict is still called by its owner's forward after it was replaced in the tree.
    """
    found = []
    for module, paths in aliases(model).items():
        for name, value in module.__dict__.items():
            if name in _MODULE_ATTRIBUTES:
                continue
            items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            if any(isinstance(item, nn.Module) and item in wanted for item in items):
                found.append((paths[0], name))
    return found


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Of the first floating tensor of the model; CPU and float32 when there is none."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. Raises NormswapError, naming the way out, for a model that cannot be copied."""
    import copy

    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever the model's own __deepcopy__ raises
        raise NormswapError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error})",
            hint="Pass inplace=True to convert the model itself.",
        ) from error
