"""Layers whose tensors torch computes by `torch.nn.utils.parametrize`, where torch shares what is each layer's own."""

from __future__ import annotations

from typing import Any

from torch.nn.utils import parametrize


def forget() -> None:
    """Drop what `parametrize.cached()` keeps: it never looks again whether a layer's parameters have changed, and goes
    by addresses in memory, where another layer may stand by now."""
    parametrize._cache.clear()


def own_class(layer: Any) -> None:
    """Give the copy of a parametrized layer a class of its own.

    Its copies share the one that torch makes for a layer: `remove_parametrizations` on one of them takes the computed
    attribute from all, and `parametrize.cached()` gives all of them the weight of the first that is asked.
    """
    shared = type(layer)
    names = dict(layer.parametrizations.named_children()) if parametrize.is_parametrized(layer) else {}
    if not names or not vars(shared).keys() >= names.keys():
        return
    kept = {name: value for name, value in vars(shared).items() if name not in names}
    layer.__class__ = type(shared.__name__, shared.__bases__, kept)
    for name in names:
        parametrize._inject_property(layer, name)
