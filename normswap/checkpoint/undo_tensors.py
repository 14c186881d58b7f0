"""What `revert` needs, as tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..conversion.undo_record import LayerUndo, Order, ParameterUndo, Undo

PREFIX = "normswap.undo."


def undo_index(undo: Undo) -> dict[str, Any] | None:
    """What the undo tensors belong to; None when nothing was kept. The order of channels is kept in any case."""
    if not undo.complete:
        return {"complete": False, "layers": [], "orders": [o.path for o in undo.orders]} if undo.orders else None
    return {
        "norms": [list(n.paths) for n in undo.norms],
        "layers": [layer.path for layer in undo.layers],
        "orders": [order.path for order in undo.orders],
        **({"parameters": [each.name for each in undo.parameters]} if undo.parameters else {}),
        "no_grad": [
            [k for k, p in n.module._parameters.items() if p is not None and not p.requires_grad] for n in undo.norms
        ],
    }


def undo_tensors(undo: Undo) -> dict[str, Tensor]:
    """By name, for the file; nothing when nothing was kept."""
    return _kept(undo)


def undo_size(undo: Undo) -> int:
    """How many bytes of a file they take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _kept(undo).values())


def _kept(undo: Undo) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for i, norm in enumerate(undo.norms if undo.complete else ()):
        found |= {f"{PREFIX}norm.{i}.{name}": t for name, t in norm.tensors.items()}
        changed = {n: t for n, t in norm.given.items() if norm.tensors.get(n) is not t}
        found |= {f"{PREFIX}given.{i}.{name}": t for name, t in changed.items()}
    for i, layer in enumerate(undo.layers if undo.complete else ()):
        parts = {n: getattr(layer, n) for n in ("scale", "shift", "bias", "correction", "weight", "given")}
        found |= {f"{PREFIX}layer.{i}.{name}": t for name, t in parts.items() if t is not None}
    for i, order in enumerate(undo.orders):
        sides = {"rows": order.rows, "columns": order.columns}
        found |= {f"{PREFIX}order.{i}.{name}": t for name, t in sides.items() if t is not None}
    for i, each in enumerate(undo.parameters if undo.complete else ()):
        sides = {"value": each.value, "given": each.given}
        found |= {f"{PREFIX}parameter.{i}.{name}": t for name, t in sides.items() if t is not None}
    return found


def fill_undo(undo: Undo, tensors: Mapping[str, Tensor], index: Mapping[str, Any] | None) -> None:
    """Put what the file had into the undo record of a network that was just swapped again."""
    undo.orders = [] if index is None else _orders(tensors, index)
    if index is None or not index.get("complete", True):
        undo.norms, undo.layers, undo.complete = [], [], False
        return
    for i, norm in enumerate(undo.norms):
        norm.tensors = _under(tensors, f"norm.{i}.")
        norm.given = {n: norm.tensors[n] for n in norm.given if n in norm.tensors} | _under(tensors, f"given.{i}.")
        for name, parameter in norm.module._parameters.items():
            if parameter is not None:
                parameter.requires_grad_(name not in index["no_grad"][i])
    undo.layers = [LayerUndo(path, **_layer_tensors(tensors, i)) for i, path in enumerate(index["layers"])]
    undo.parameters = _parameters(tensors, index)


def check_undo(tensors: Mapping[str, Tensor], index: Mapping[str, Any] | None) -> None:
    """Raise KeyError or TypeError when something to undo the conversion with is missing."""
    for i, path in enumerate(() if index is None else index["layers"]):
        LayerUndo(path, **_layer_tensors(tensors, i))
    _parameters(tensors, index or {})
    for order in () if index is None else _orders(tensors, index):
        sides = [side for side in (order.rows, order.columns) if side is not None]
        if not sides or not all(torch.equal(side.sort().values, torch.arange(len(side))) for side in sides):
            raise ValueError(f"the order of {order.path} is none")


def _parameters(tensors: Mapping[str, Tensor], index: Mapping[str, Any]) -> list[ParameterUndo]:
    names = index.get("parameters", ())
    parts = (_under(tensors, f"parameter.{i}.") for i in range(len(names)))
    return [ParameterUndo(name, part.get("value"), part["given"]) for name, part in zip(names, parts, strict=True)]


def _orders(tensors: Mapping[str, Tensor], index: Mapping[str, Any]) -> list[Order]:
    return [Order(path, **_under(tensors, f"order.{i}.")) for i, path in enumerate(index.get("orders", ()))]


def _layer_tensors(tensors: Mapping[str, Tensor], i: int) -> dict[str, Any]:
    return {"bias": None, **_under(tensors, f"layer.{i}.")}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(PREFIX + prefix) :]: v for k, v in tensors.items() if k.startswith(PREFIX + prefix)}
