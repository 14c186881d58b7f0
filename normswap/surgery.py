"""Walk a module tree with all its aliases, and replace modules by path. Knows nothing about norms."""

from __future__ import annotations

import functools
import operator
import os
import random
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from .errors import Fix, NormswapError, OptionError, Text
from .path_ranges import matches as matches
from .records import ATTRIBUTE

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
    """Undo what a forward pass leaves behind: attributes of the modules, buffers, random states.

    Lists, dicts, sets and objects among the attributes get their members back, buffers changed in place their values;
    the random states are those of torch, Python and NumPy.
    """
    values = [(b, b._version, b.clone()) for b in model.buffers() if not b.is_inference()]
    with torch.random.fork_rng(devices=_cuda_devices(model)), _other_random_states(), attributes_restored(model):
        try:
            yield
        finally:
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.data.copy_(value)


@contextmanager
def _other_random_states() -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    before = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(before[0])
        if numpy:
            numpy.random.set_state(before[1])


def seed_everything(model: nn.Module) -> None:
    """Set the random states of torch, on the model's device too, of Python and of NumPy; for use in `undisturbed`."""
    torch.default_generator.manual_seed(0)
    for device in _cuda_devices(model):
        torch.cuda.default_generators[device].manual_seed(0)
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Put the modules' attributes back as they were, lists, dicts and sets among them with their members."""
    containers = list(_containers(model))
    before = [dict(c) if isinstance(c, dict) else list(c) for c in containers]
    slots = [(value, _slots_of(value)) for value in kept_by(model) if _slots_of(value)]
    try:
        yield
    finally:
        for container, members in zip(containers, before, strict=True):
            _restore(container, members)
        for value, slot_values in slots:
            for name in _slots_of(value).keys() - slot_values.keys():
                object.__delattr__(value, name)
            for name, member in slot_values.items():
                object.__setattr__(value, name, member)


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


Container = list[Any] | dict[Any, Any] | set[Any] | deque[Any]


def _containers(model: nn.Module) -> Iterator[Container]:
    """The modules' own tables, and every list, dict and set among their attributes, nested ones included.

    So are the tables of objects of the network's own, a cache or a state, say.
    """
    for module in model.modules():
        yield module.__dict__
        yield module._parameters
        yield module._buffers
        yield module._modules
    yield from (v for v in kept_by(model) if isinstance(v, (list, dict, set, deque)))


def kept_by(model: nn.Module) -> Iterator[Any]:
    """All that the modules hold in attributes of their own, and what that holds, in objects of the network's own too.

    Each thing once: modules often share one configuration. The record of a conversion is no part of the network.
    """
    values = [value for module in model.modules() for name, value in own_attributes(module) if name != ATTRIBUTE]
    return (v for v in _nested(values, _attributes_of) if v is not values)


def _attributes_of(value: Any) -> Iterable[Any]:
    """What an object holds in attributes: its table, and its slots; nothing for what is no object of somebody's own."""
    cls: type = type(value)
    if not _is_own(cls):
        return ()
    table = getattr(value, "__dict__", None)
    return [*([table] if isinstance(table, dict) else []), *_slots_of(value).values()]


def _slots_of(value: Any) -> dict[str, Any]:
    cls: type = type(value)
    if not _is_own(cls):
        return {}
    names = (name for base in cls.__mro__ for name in _as_tuple(vars(base).get("__slots__", ())))
    return {n: getattr(value, n) for n in names if n not in ("__dict__", "__weakref__") and hasattr(value, n)}


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


@functools.cache
def _is_own(cls: type) -> bool:
    """Whether objects of a class may be a network's own: not those of torch, and of Python's own few."""
    if issubclass(cls, (nn.Module, torch.Tensor, type, list, tuple, dict, set, deque)):
        return False
    package = cls.__module__.partition(".")[0]
    return package not in ("torch", "numpy") and (cls in (SimpleNamespace, Namespace) or package not in _STANDARD)


_STANDARD = sys.stdlib_module_names  # "builtins", of functions and modules, is one of them


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
    return (v for v in _nested(value) if not isinstance(v, _NESTING))


def reachable_from(value: Any) -> Iterator[Any]:
    """As `leaves_of`, with what objects of the network's own hold in their attributes."""
    return (v for v in _nested(value, _attributes_of) if not isinstance(v, _NESTING))


def _nested(value: Any, opened: Callable[[Any], Iterable[Any]] = lambda value: ()) -> Iterator[Any]:
    """A value and all that it holds; `opened` gives what other things than containers hold."""
    if type(value) is tuple and _SCALARS.issuperset(map(type, value)):  # a kernel size, a stride
        return
    stack, seen = [value], {id(value)}
    while stack:
        item = stack.pop()
        yield item
        members = item.values() if isinstance(item, dict) else item if isinstance(item, _NESTING) else opened(item)
        for member in members:
            if type(member) not in _SCALARS and id(member) not in seen:
                seen.add(id(member))
                stack.append(member)


_NESTING = (list, tuple, dict, set, deque)


def _restore(container: Container, before: dict[Any, Any] | list[Any]) -> None:
    if isinstance(container, dict) and isinstance(before, dict):
        if container.keys() != before.keys() or not _identical(container.values(), before.values()):
            container.clear()
            container.update(before)
    elif len(container) != len(before) or not _identical(container, before):
        container.clear()
        if isinstance(container, (list, deque)):
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

    A module kept in a plain list or dict, as an attribute that bypasses the table, as a bound method, in a closure or
    in a `functools.partial` is still called by its owner's forward after it was replaced in the tree.
    """
    found: list[tuple[str, str, nn.Module]] = []
    for holder, names in paths.items():
        for attribute, value in own_attributes(holder):
            held = (module for leaf in leaves_of(value) for module in _held(leaf))
            found += [(names[0], attribute, module) for module in held if module is not holder and module in paths]
    return list(dict.fromkeys(found))


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
            inside = [*_closed_over(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        waiting += [member for each in inside for member in leaves_of(each)]
    return found


def _closed_over(function: FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # empty: its variable was deleted, or not set yet
            continue
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
    for path, module in model.named_modules():
        other = copies.get(path)
        if other is None:
            continue
        if other.training != module.training:
            other.training = module.training
        for name, value in module.__dict__.items() if isinstance(module, fx.GraphModule) else ():
            if name not in other.__dict__ or (name in _HOOK_ATTRIBUTES and value and not other.__dict__[name]):
                other.__dict__[name] = copy.deepcopy(value, memo)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, with the flags, hooks and attributes that some classes lose in it.

    Raises NormswapError, naming the way out, for a model that cannot be copied.
    """
    import copy

    memo: dict[int, Any] = {}
    try:
        twin = copy.deepcopy(model, memo)
        _complete(twin, model, memo)
        return twin
    except Exception as error:  # whatever the model's own __deepcopy__ raises
        raise NormswapError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error})",
            hint=Text("Pass ", Fix("inplace", True), " to convert the model itself."),
        ) from error
