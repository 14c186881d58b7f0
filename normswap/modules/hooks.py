"""Hand over to a new module what users attached to the old one: hooks and attributes."""

from __future__ import annotations

from torch import nn

from .attributes import MODULE_ATTRIBUTES

_HOOK_ATTRIBUTES = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks") or "_hooks_" in name)


def adopt(new: nn.Module, old: nn.Module, *, known: frozenset[str] = frozenset()) -> None:
    """Give `new` what users attached to `old`: hooks and extra attributes.

    Hook tables are handed over as the same objects, so that `handle.remove()` keeps working. Attributes that `new`
    has itself, that are in `known`, or that belong to the old class are left out.
    """
    hand_over_hooks(new, old)
    for name, value in old.__dict__.items():
        if name not in MODULE_ATTRIBUTES and name not in known and name not in new.__dict__:
            new.__dict__[name] = value


def hand_over_hooks(new: nn.Module, old: nn.Module) -> None:
    """Let `new` have every hook of `old`, in the same tables, so that the handles still remove them."""
    for name in _HOOK_ATTRIBUTES:
        if old.__dict__.get(name):
            new.__dict__[name] = old.__dict__[name]
    if old._backward_hooks:
        new._is_full_backward_hook = old._is_full_backward_hook
