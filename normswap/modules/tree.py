"""Walk a module tree with all its aliases, and replace modules by path. Knows nothing about norms."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn

from ..errors import Fix, NormswapError, Text
from ..files.spilling import lent
from .attributes import closed_over, leaves_of, own_attributes
from .hooks import _HOOK_ATTRIBUTES
from .parametrized import forget, own_class


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


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; '' is the root. Raises KeyError when there is none."""
    for name in path.split(".") if path else ():
        child = model._modules.get(name)
        if child is None:
            raise KeyError(path)
        model = child
    return model


def replace_module(model: nn.Module, paths: Iterable[str], new: nn.Module) -> nn.Module:
    """Put `new` at every path; returns the root, which is `new` itself when the root was replaced.

    Writes into the parent's table of children, so that a parent whose `add_module` or `__setattr__` is overridden
    cannot interfere, and the order of children stays.
    """
    for path in paths:
        if path == "":
            return new
        parent_path, _, name = path.rpartition(".")
        parent = module_at(model, parent_path)
        if name not in parent._modules:
            raise KeyError(path)
        parent._modules[name] = new
    return model


def hidden_references(paths: Mapping[nn.Module, list[str]]) -> list[tuple[str, str, nn.Module]]:
    """Places outside the tables of children that hold a module of the tree: (path of the holder, attribute, module).

    paths: what `aliases` returned.

    A module kept in a plain list or dict, as an attribute that bypasses the table, as a bound method, in a closure or
    in a `functools.partial` is still called by its owner's forward after it was replaced in the tree.
    """
    found: list[tuple[str, str, nn.Module]] = []
    for holder, names in paths.items():
        for attribute, value in own_attributes(holder):
            held = (module for leaf in leaves_of(value) for module in _held(leaf))
            found += [(names[0], attribute, module) for module in held if module is not holder and module in paths]
    return list(dict.fromkeys(found))


def held_elsewhere(paths: Mapping[nn.Module, list[str]]) -> dict[nn.Module, list[str]]:
    """The modules that `hidden_references` finds, each with the attributes that hold it, as `PATH.ATTRIBUTE`."""
    found: dict[nn.Module, list[str]] = {}
    for holder, attribute, module in hidden_references(paths):
        found.setdefault(module, []).append(f"{holder}.{attribute}" if holder else attribute)
    return found


def _held(leaf: Any) -> list[nn.Module]:
    """The modules that a value is, or that a function holds: bound, in its closure, its defaults or its arguments."""
    found: list[nn.Module] = []
    waiting, seen = [leaf], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, nn.Module):
            found.append(value)
        if id(value) in seen or not isinstance(value, (MethodType, FunctionType, functools.partial)):
            continue
        seen.add(id(value))
        if isinstance(value, MethodType):
            inside: list[Any] = [value.__self__, value.__func__]
        elif isinstance(value, functools.partial):
            inside = [value.func, *value.args, *value.keywords.values()]
        else:
            inside = [*closed_over(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        waiting += [member for each in inside for member in leaves_of(each)]
    return found


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Of the first floating tensor of the model; CPU and float32 when there is none."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def _complete(twin: nn.Module, model: nn.Module, memo: dict[int, Any]) -> None:
    """Give a copy what some classes leave out of it: training flags, and hooks and attributes of traced networks."""
    import copy

    copies = dict(twin.named_modules())
    if twin.training != model.training:
        twin.train(model.training)  # a feature extractor of torchvision exchanges its graph for that of the mode
    forget()
    for other in copies.values():
        own_class(other)
    for path, module in model.named_modules():
        other = copies.get(path)
        if other is None:
            continue
        if other.training != module.training:
            other.training = module.training
        for name, value in module.__dict__.items() if isinstance(module, fx.GraphModule) else ():
            if name not in other.__dict__ or (name in _HOOK_ATTRIBUTES and value and not other.__dict__[name]):
                other.__dict__[name] = copy.deepcopy(value, memo)


def _or_within(model: nn.Module) -> str:
    """Names the only child of a module, which may be the network that it wraps."""
    children = [name for name, child in model._modules.items() if child is not None]
    return f", or convert the network within it, .{children[0]}" if len(children) == 1 and not model._parameters else ""


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, with the flags, hooks and attributes that some classes lose in it.

    A tensor that a module keeps from its last pass, as the old `weight_norm` does, is copied without its gradient's
    history, which torch refuses to copy. Where tensors are spilled, those in files that were read are shared with the
    model. Raises NormswapError, naming the way out, for a model that cannot be copied.
    """
    import copy

    memo: dict[int, Any] = {}
    for module in nn.Module.modules(model):
        kept = [value for value in module.__dict__.values() if isinstance(value, torch.Tensor) and not value.is_leaf]
        memo |= {id(value): value.detach().clone() for value in kept}
    try:
        memo.update(lent((*model.parameters(), *model.buffers())))
        twin = copy.deepcopy(model, memo)
        _complete(twin, model, memo)
        return twin
    except Exception as error:  # whatever the model's own __deepcopy__ raises
        raise NormswapError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error})",
            hint=Text("Pass ", Fix("inplace", True), " to convert the model itself", _or_within(model), "."),
        ) from error
