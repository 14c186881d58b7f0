"""What hands a stream's channels on unchanged: views, permutations, pieces, means over other dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..modules.path_ranges import ROOT


@dataclass(frozen=True)
class Share:
    """How a tensor takes part in a stream: which of its dimensions the channels are, and the layer scales that are yet
    to multiply it, by their parameters' names, the next one last."""

    dim: int
    scales: tuple[str, ...] = ()


@dataclass(frozen=True)
class Link:
    """A tensor of an operation: an input or an output, and which."""

    of_input: bool
    position: int


class Offence(Exception):
    """What keeps a stream from having its mean taken out."""

    def __init__(self, reason: str, operation: Any = None) -> None:
        where = "" if operation is None else f" ({operation.kind} in {operation.where or ROOT})"
        super().__init__(reason + where)


Linked = Iterator[tuple[Link, Share]]
Rule = Callable[[Any, Link, Share], Linked]
OUT = Link(False, 0)


def offence(operation: Any, at: Link) -> Offence:
    return Offence(f"it is {'read' if at.of_input else 'written'} by what is no linear layer or sum", operation)


def value_at(operation: Any, link: Link) -> Any:
    return (operation.inputs if link.of_input else operation.outputs)[link.position]


def moved(there: Callable[[Any, int], int | None], back: Callable[[Any, int], int | None]) -> Rule:
    """For operations that put values elsewhere. there, back: the channels' dimension in the output, by that of the
    input, and the other way round; None where the operation does not leave them whole."""

    def rule(operation: Any, at: Link, share: Share) -> Linked:
        if at.of_input and at.position:
            raise offence(operation, at)
        dim = share.dim if at.of_input else back(operation, share.dim)
        out = None if dim is None else there(operation, dim)
        if dim is None or out is None or (not at.of_input and out != share.dim):
            raise Offence("its channels do not stay together", operation)
        yield Link(True, 0), Share(dim, share.scales)
        for i in range(len(operation.outputs)):
            yield Link(False, i), Share(out, share.scales)

    return rule


def same(operation: Any, dim: int) -> int:
    return dim


def _not_along(position: int, default: int = 0) -> Rule:
    """What works along one dimension, which must not be that of the channels."""

    def kept(operation: Any, dim: int) -> int | None:
        along = operation.given(position, default)
        return None if along % len(operation.inputs[0].shape) == dim else dim

    return moved(kept, kept)


def _without(position: int = 1) -> Rule:
    """What takes one dimension away."""

    def there(operation: Any, dim: int) -> int | None:
        along = operation.given(position, 0) % len(operation.inputs[0].shape)
        return None if along == dim else dim - (along < dim)

    def back(operation: Any, dim: int) -> int:
        along = operation.given(position, 0) % len(operation.inputs[0].shape)
        return dim + (along <= dim)

    return moved(there, back)


def _unsqueezed() -> Rule:
    def there(operation: Any, dim: int) -> int:
        return dim + (operation.given(1) % len(operation.outputs[0].shape) <= dim)

    def back(operation: Any, dim: int) -> int | None:
        along = operation.given(1) % len(operation.outputs[0].shape)
        return None if along == dim else dim - (along < dim)

    return moved(there, back)


def _viewed() -> Rule:
    """By what lies before and behind the channels."""

    def found(one: tuple[int, ...], other: tuple[int, ...], dim: int) -> int | None:
        before = math.prod(one[:dim])
        for i, size in enumerate(other):
            if size == one[dim] and math.prod(other[:i]) == before:
                return i
        return None

    return moved(
        lambda op, dim: found(op.inputs[0].shape, op.outputs[0].shape, dim),
        lambda op, dim: found(op.outputs[0].shape, op.inputs[0].shape, dim),
    )


def _permuted(order: Callable[[Any], list[int]]) -> Rule:
    return moved(lambda op, dim: order(op).index(dim), lambda op, dim: order(op)[dim])


def _transposed(operation: Any) -> list[int]:
    count = len(operation.inputs[0].shape)
    order = list(range(count))
    a, b = (operation.given(1) % count, operation.given(2) % count) if operation.kind == "transpose" else (0, count - 1)
    order[a], order[b] = order[b], order[a]
    return order


def _order(operation: Any) -> list[int]:
    count = len(operation.inputs[0].shape)
    return [i % count for i in operation.given(1)]


def averaged() -> Rule:
    """A mean or a sum over other dimensions."""

    def taken(operation: Any) -> list[int]:
        count = len(operation.inputs[0].shape)
        dims = operation.given(1)
        return [i % count for i in (range(count) if dims is None else [dims] if isinstance(dims, int) else dims)]

    def there(operation: Any, dim: int) -> int | None:
        if dim in taken(operation):
            return None
        return dim if operation.given(2, False) else dim - sum(i < dim for i in taken(operation))

    def back(operation: Any, dim: int) -> int | None:
        if operation.given(2, False):
            return dim
        rest = [i for i in range(len(operation.inputs[0].shape)) if i not in taken(operation)]
        return rest[dim] if dim < len(rest) else None

    return moved(there, back)


def images() -> Rule:
    """What pools or resizes maps: channel by channel, by sums whose weights do not depend on values."""

    def kept(operation: Any, dim: int) -> int | None:
        return dim if dim == len(operation.inputs[0].shape) - 3 else None

    return moved(kept, kept)


def _expanded() -> Rule:
    def there(operation: Any, dim: int) -> int:
        return dim + len(operation.outputs[0].shape) - len(operation.inputs[0].shape)

    def back(operation: Any, dim: int) -> int | None:
        dim -= len(operation.outputs[0].shape) - len(operation.inputs[0].shape)
        return dim if dim >= 0 and operation.inputs[0].shape[dim] > 1 else None

    return moved(there, back)


_UNCHANGED = ("clone", "alias", "detach", "_to_copy", "lift_fresh", "contiguous")
CARRIERS: dict[str, Rule] = {
    **dict.fromkeys(_UNCHANGED, moved(same, same)),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "squeeze"), _viewed()),
    **dict.fromkeys(("slice", "index_select", "narrow"), _not_along(1)),
    "split": _not_along(2),
    "split_with_sizes": _not_along(2),
    "chunk": _not_along(2),
    "select": _without(),
    "unbind": _without(),
    "unsqueeze": _unsqueezed(),
    "permute": _permuted(_order),
    "transpose": _permuted(_transposed),
    "t": _permuted(_transposed),
    "expand": _expanded(),
    "mean": averaged(),
}
"""What hands values on as they are, or their means: each channel may be scaled and shifted before or after."""
