"""Walk a module tree with all its aliases, and replace modules by path. Knows nothing about norms."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from .errors import NormswapError, OptionError
from .path_ranges import matches as matches

# What every nn.Module carries; anything else in a module's __dict__ is its own or its user's.
_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)
_SCALARS = frozenset({bool, int, float, str, type(None)})
_HOOK_ATTRIBUTES = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks") or "_hooks_" in name)


def check_module(model: Any, name: str = "model") -> None:
    """Raise OptionError for what is no network, such as its name."""
    if not isinstance(model, nn.Module):
        hint = "normswap.load(file) gives the network of a file." if isinstance(model, (str, os.PathLike)) else None
        raise OptionError(f"{name}: expected a torch.nn.Module, got {type(model).__name__}", hint=hint)


def aliases(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module of the tree with all the paths it is reachable by, in traversal order; the root's is ''.

    A module that is its own descendant is not followed a second time.
    """
    found: dict[nn.Module, list[str]] = {}
    stack: list[tuple[str, nn.Module, tuple[nn.Module, ...]]] = [("", model, ())]
    while stack:
        path, module, above = stack.pop()
        found.setdefault(module, []).append(path)
        if module._modules:
            prefix, above = f"{path}." if path else "", (*above, module)
            children = [(n, c) for n, c in module._modules.items() if c is not None and c not in above]
            stack.extend((prefix + name, child, above) for name, child in reversed(children))
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
    hand_over_hooks(new, old)
    for name, value in old.__dict__.items():
        if name not in _MODULE_ATTRIBUTES and name not in known and name not in new.__dict__:
            new.__dict__[name] = value


def hand_over_hooks(new: nn.Module, old: nn.Module) -> None:
    """Let `new` have every hook of `old`, in the same tables, so that the handles still remove them."""
    for name in _HOOK_ATTRIBUTES:
        if old.__dict__.get(name):
            new.__dict__[name] = old.__dict__[name]
    if old._backward_hooks:
        new._is_full_backward_hook = old._is_full_backward_hook


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
    """Undo what a forward pass leaves behind on the modules themselves: attributes, buffers, random state.

    Lists, dicts and sets among the attributes get their members back, buffers changed in place their values.
    """
    containers = list(_containers(model))
    before = [dict(c) if isinstance(c, dict) else list(c) for c in containers]
    values = [(b, b._version, b.clone()) for b in model.buffers() if not b.is_inference()]
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        try:
            yield
        finally:
            for container, members in zip(containers, before, strict=True):
                _restore(container, members)
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.data.copy_(value)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Put the modules back as they were, with their attributes, if the block fails. Yields what calls that off."""
    containers = list(_containers(model))
    before = [dict(c) if isinstance(c, dict) else list(c) for c in containers]
    wanted = True

    def keep() -> None:
        nonlocal wanted
        wanted = False

    try:
        yield keep
    except BaseException:
        if wanted:
            for container, members in zip(containers, before, strict=True):
                _restore(container, members)
        raise


Container = list[Any] | dict[Any, Any] | set[Any]


def _containers(model: nn.Module) -> Iterator[Container]:
    """The modules' own tables, and every list, dict and set among their attributes, nested ones included."""
    for module in model.modules():
        yield module.__dict__
        yield module._parameters
        yield module._buffers
        yield module._modules
        for _, value in own_attributes(module):
            if isinstance(value, (list, tuple, dict, set)):
                yield from (v for v in _nested(value) if isinstance(v, (list, dict, set)))


def own_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """A module's attributes that can hold objects: not those that every module has, nor numbers and texts."""
    table = module.__dict__
    return [(name, value) for name in _own_names(tuple(table)) if type(value := table[name]) not in _SCALARS]


@functools.lru_cache(maxsize=1024)
def _own_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Modules of one class mostly have the same names, in the same order."""
    return tuple(name for name in names if name not in _MODULE_ATTRIBUTES)


def leaves_of(value: Any) -> Iterator[Any]:
    """What a value holds at the bottom of its lists, tuples, dicts and sets; itself if it is none of these.

    A tuple of nothing but numbers and texts is passed over.
    """
    return (v for v in _nested(value) if not isinstance(v, (list, tuple, dict, set)))


def _nested(value: Any) -> Iterator[Any]:
    if not isinstance(value, (list, tuple, dict, set)):
        yield value
        return
    if type(value) is tuple and _SCALARS.issuperset(map(type, value)):  # a kernel size, a stride
        return
    stack, seen = [value], {id(value)}
    while stack:
        item = stack.pop()
        yield item
        for member in item.values() if isinstance(item, dict) else item:
            if not isinstance(member, (list, tuple, dict, set)):
                yield member
            elif id(member) not in seen:
                seen.add(id(member))
                stack.append(member)


def _restore(container: Container, before: dict[Any, Any] | list[Any]) -> None:
    if isinstance(container, dict) and isinstance(before, dict):
        if container.keys() != before.keys() or not _identical(container.values(), before.values()):
            container.clear()
            container.update(before)
    elif len(container) != len(before) or not _identical(container, before):
        container.clear()
        if isinstance(container, list):
            container.extend(before)
        else:
            container.update(before)


def _identical(now: Iterable[Any], before: Iterable[Any]) -> bool:
    """Whether all members are the same objects; nobody's `__eq__` is asked, because a tensor's is no yes or no."""
    return all(map(operator.is_, now, before))


def _cuda_devices(model: nn.Module) -> list[int]:
    first = next(model.parameters(), None)
    return [first.device.index or 0] if first is not None and first.device.type == "cuda" else []


def hidden_references(paths: Mapping[nn.Module, list[str]]) -> list[tuple[str, str, nn.Module]]:
    """Places outside the tables of children that hold a module of the tree: (path of the holder, attribute, module).

    paths: what `aliases` returned.

    A module kept in a plain list or dict, as an attribute that bypasses the table, or as a bound method, is still
    called by its owner's forward after it was replaced in the tree.
    """
    found: list[tuple[str, str, nn.Module]] = []
    for holder, names in paths.items():
        for attribute, value in own_attributes(holder):
            for leaf in leaves_of(value):
                module = leaf.__self__ if isinstance(leaf, MethodType) else leaf
                if isinstance(module, nn.Module) and module is not holder and module in paths:
                    found.append((names[0], attribute, module))
    return list(dict.fromkeys(found))


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
