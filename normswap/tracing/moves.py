"""Calls that put the last dimension second, whole: a linear layer's channels where a BatchNorm1d has its own.

`BatchNorm1d` takes two or three dimensions, with as many channels as it has. Said is what holds of every value of which
such a norm, with the layer's number of channels, then takes what the call makes. That is why `(-1, n)` keeps the rows
whole, and why `flatten(0, 1)` is none: it leaves four dimensions three, the channels last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

_MOVES = {"view", "reshape", "permute", "flatten", "transpose", "swapaxes", "swapdims"}


def is_move(node: fx.Node) -> bool:
    """Whether a call of a symbolic run is one."""
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    if node.op not in ("call_method", "call_function") or node.kwargs or name not in _MOVES:
        return False
    if node.op == "call_function" and node.target is not getattr(torch, name, None):
        return False
    given: Sequence[Any] = node.args[1:]
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = given[0]
    if name in ("view", "reshape"):
        return len(given) == 2
    known = [list(given)] if all(isinstance(dim, int) for dim in given) else []
    if name == "permute":
        return known in ([[0, 2, 1]], [[0, -1, 1]], [[0, -1, -2]])
    # (1, -1) moves nothing where there are but two.
    return known == [[0, -2]] if name == "flatten" else known in ([[1, 2]], [[2, 1]], [[1, -1]], [[-1, 1]])


def was_move(name: str, args: Sequence[Any], out: Any) -> bool:
    """Whether an operation of a recorded run was one, on what it was given there. name: of the aten operation."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not isinstance(out, Tensor) or x.dim() < 2:
        return False
    if name == "transpose":
        return {args[1] % x.dim(), args[2] % x.dim()} == {1, x.dim() - 1}
    if name == "permute":
        return [dim % x.dim() for dim in args[1]] == [0, 2, 1]
    return name in ("view", "_unsafe_view") and out.dim() == 2
