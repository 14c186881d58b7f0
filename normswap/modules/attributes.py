"""What modules hold in attributes of their own, beside parameters, buffers and children."""

from __future__ import annotations

import functools
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import nn

# What every nn.Module carries; anything else in a module's __dict__ is its own or its user's.
MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)
SCALARS = frozenset({bool, int, float, str, type(None)})
RECORD = "_normswap"
"""Where `conversion.record` keeps what a network remembers of its conversion; no part of the network itself."""


def kept_by(model: nn.Module) -> Iterator[Any]:
    """All that the modules hold in attributes of their own, and what that holds, in objects of the network's own too.

    Each thing once: modules often share one configuration. The record of a conversion is no part of the network.
    """
    values = [value for module in nn.Module.modules(model) for name, value in own_attributes(module) if name != RECORD]
    return (v for v in nested(values, attributes_of) if v is not values)


def tensors_kept_by(model: nn.Module) -> list[torch.Tensor]:
    """Tensors that modules hold in attributes or as buffers, which are not parameters."""
    held = (*kept_by(model), *model.buffers())
    return [value for value in held if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)]


def attributes_of(value: Any) -> Iterable[Any]:
    """What an object holds in attributes: its table, and its slots; nothing for what is no object of somebody's own.

    Of a function, what it closes over.
    """
    if isinstance(value, FunctionType):
        return closed_over(value)
    cls: type = type(value)
    if not _is_own(cls):
        return ()
    table = getattr(value, "__dict__", None)
    return [*([table] if isinstance(table, dict) else []), *_slots_of(value).values()]


def closed_over(function: FunctionType) -> list[Any]:
    """What the variables hold that a function takes from where it was defined."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # empty: its variable was deleted, or not set yet
            continue
    return found


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
    return package not in ("torch", "numpy", "normswap") and (
        cls in (SimpleNamespace, Namespace) or package not in _STANDARD
    )


_STANDARD = sys.stdlib_module_names  # "builtins", of functions and modules, is one of them


def own_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """A module's attributes that can hold objects: not those that every module has, nor numbers and texts."""
    table = module.__dict__
    return [(name, value) for name in _own_names(tuple(table)) if type(value := table[name]) not in SCALARS]


@functools.lru_cache(maxsize=1024)
def _own_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Modules of one class mostly have the same names, in the same order."""
    return tuple(name for name in names if name not in MODULE_ATTRIBUTES)


def leaves_of(value: Any) -> Iterator[Any]:
    """What a value holds at the bottom of its lists, tuples, dicts and sets; itself if it is none of these.

    A tuple of nothing but numbers and texts is passed over.
    """
    return (v for v in nested(value) if not isinstance(v, NESTING))


def reachable_from(value: Any) -> Iterator[Any]:
    """As `leaves_of`, with what objects of the network's own hold in their attributes."""
    return (v for v in nested(value, attributes_of) if not isinstance(v, NESTING))


def nested(value: Any, opened: Callable[[Any], Iterable[Any]] = lambda value: ()) -> Iterator[Any]:
    """A value and all that it holds; `opened` gives what other things than containers hold."""
    if type(value) is tuple and SCALARS.issuperset(map(type, value)):  # a kernel size, a stride
        return
    stack, seen = [value], {id(value)}
    while stack:
        item = stack.pop()
        yield item
        members = item.values() if isinstance(item, dict) else item if isinstance(item, NESTING) else opened(item)
        for member in members:
            if type(member) not in SCALARS and id(member) not in seen:
                seen.add(id(member))
                stack.append(member)


NESTING = (list, tuple, dict, set, deque)
