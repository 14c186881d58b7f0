"""How each of torch's operations hands a stream's channels on: what else is in a stream when one of its tensors is.

An operation may be passed where taking the mean of channels out of some of its tensors takes it out of its result, and
out of nothing else: it is linear in them and treats all channels alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..modules.path_ranges import ROOT

LAYER_NORM = "native_layer_norm"


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


def links(operation: Any, at: Link, share: Share) -> Linked:
    """The tensors of an operation that are in a stream because the one `at` is; it is itself among them.

    Raises Offence where the operation does something else with it.
    """
    rule = RULES.get(operation.kind.removesuffix("_"))
    if rule is None:
        raise _offence(operation, at)
    return rule(operation, at, share)


def _offence(operation: Any, at: Link) -> Offence:
    return Offence(f"it is {'read' if at.of_input else 'written'} by what is no linear layer or sum", operation)


def _value(operation: Any, link: Link) -> Any:
    return (operation.inputs if link.of_input else operation.outputs)[link.position]


# --- one tensor in, one or more of the same kind out -----------------------------------------------------------


def _moved(there: Callable[[Any, int], int | None], back: Callable[[Any, int], int | None]) -> Rule:
    """For operations that put values elsewhere. there, back: the channels' dimension in the output, by that of the
    input, and the other way round; None where the operation does not leave them whole."""

    def rule(operation: Any, at: Link, share: Share) -> Linked:
        if at.of_input and at.position:
            raise _offence(operation, at)
        dim = share.dim if at.of_input else back(operation, share.dim)
        out = None if dim is None else there(operation, dim)
        if dim is None or out is None or (not at.of_input and out != share.dim):
            raise Offence("its channels do not stay together", operation)
        yield Link(True, 0), Share(dim, share.scales)
        for i in range(len(operation.outputs)):
            yield Link(False, i), Share(out, share.scales)

    return rule


def _same(operation: Any, dim: int) -> int:
    return dim


def _not_along(position: int, default: int = 0) -> Rule:
    """What works along one dimension, which must not be that of the channels."""

    def kept(operation: Any, dim: int) -> int | None:
        along = operation.given(position, default)
        return None if along % len(operation.inputs[0].shape) == dim else dim

    return _moved(kept, kept)


def _without(position: int = 1) -> Rule:
    """What takes one dimension away."""

    def there(operation: Any, dim: int) -> int | None:
        along = operation.given(position, 0) % len(operation.inputs[0].shape)
        return None if along == dim else dim - (along < dim)

    def back(operation: Any, dim: int) -> int:
        along = operation.given(position, 0) % len(operation.inputs[0].shape)
        return dim + (along <= dim)

    return _moved(there, back)


def _unsqueezed() -> Rule:
    def there(operation: Any, dim: int) -> int:
        return dim + (operation.given(1) % len(operation.outputs[0].shape) <= dim)

    def back(operation: Any, dim: int) -> int | None:
        along = operation.given(1) % len(operation.outputs[0].shape)
        return None if along == dim else dim - (along < dim)

    return _moved(there, back)


def _viewed() -> Rule:
    """By what lies before and behind the channels."""

    def found(one: tuple[int, ...], other: tuple[int, ...], dim: int) -> int | None:
        before = math.prod(one[:dim])
        for i, size in enumerate(other):
            if size == one[dim] and math.prod(other[:i]) == before:
                return i
        return None

    return _moved(
        lambda op, dim: found(op.inputs[0].shape, op.outputs[0].shape, dim),
        lambda op, dim: found(op.outputs[0].shape, op.inputs[0].shape, dim),
    )


def _permuted(order: Callable[[Any], list[int]]) -> Rule:
    return _moved(lambda op, dim: order(op).index(dim), lambda op, dim: order(op)[dim])


def _transposed(operation: Any) -> list[int]:
    count = len(operation.inputs[0].shape)
    order = list(range(count))
    a, b = (operation.given(1) % count, operation.given(2) % count) if operation.kind == "transpose" else (0, count - 1)
    order[a], order[b] = order[b], order[a]
    return order


def _order(operation: Any) -> list[int]:
    count = len(operation.inputs[0].shape)
    return [i % count for i in operation.given(1)]


def _averaged() -> Rule:
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

    return _moved(there, back)


def _images() -> Rule:
    """What pools or resizes maps: channel by channel, by sums whose weights do not depend on values."""

    def kept(operation: Any, dim: int) -> int | None:
        return dim if dim == len(operation.inputs[0].shape) - 3 else None

    return _moved(kept, kept)


def _expanded() -> Rule:
    def there(operation: Any, dim: int) -> int:
        return dim + len(operation.outputs[0].shape) - len(operation.inputs[0].shape)

    def back(operation: Any, dim: int) -> int | None:
        dim -= len(operation.outputs[0].shape) - len(operation.inputs[0].shape)
        return dim if dim >= 0 and operation.inputs[0].shape[dim] > 1 else None

    return _moved(there, back)


# --- several tensors --------------------------------------------------------------------------------------------


def _joined(operation: Any, at: Link, share: Share) -> Linked:
    """Tensors one behind the other, along another dimension than the channels'."""
    along = operation.given(1, 0) % len(operation.outputs[0].shape)
    if along == share.dim:
        raise Offence("its channels are joined with others", operation)
    for i in range(len(operation.inputs)):
        yield Link(True, i), share
    yield OUT, share


def _stacked(operation: Any, at: Link, share: Share) -> Linked:
    along = operation.given(1, 0) % len(operation.outputs[0].shape)
    dim = share.dim if at.of_input else share.dim - (along < share.dim)
    if not at.of_input and along == share.dim:
        raise Offence("its channels do not stay together", operation)
    for i in range(len(operation.inputs)):
        yield Link(True, i), Share(dim, share.scales)
    yield OUT, Share(dim + (along <= dim), share.scales)


def _added(operation: Any, at: Link, share: Share) -> Linked:
    """A sum: every summand must be in the stream, with all of its channels."""
    shape = operation.outputs[0].shape
    dim = _aligned(operation, at, share.dim)
    if len(operation.inputs) < 2:
        if operation.given(1) == 0:
            yield from ((Link(True, 0), Share(dim, share.scales)), (OUT, Share(dim, share.scales)))
            return
        raise Offence("a number is added to all of its channels", operation)
    for i, summand in enumerate(operation.inputs):
        own = dim - (len(shape) - len(summand.shape))
        if own < 0 or summand.shape[own] != shape[dim]:
            raise Offence("one value is added to all of its channels", operation)
        yield Link(True, i), Share(own, share.scales)
    yield OUT, Share(dim, share.scales)


def _aligned(operation: Any, at: Link, dim: int) -> int:
    """The channels' dimension in the output, where shapes are matched from behind."""
    return dim + len(operation.outputs[0].shape) - len(_value(operation, at).shape)


def _multiplied(operation: Any, at: Link, share: Share) -> Linked:
    """A product with a number, or with what is the same for all channels; or a layer scale."""
    shape, dim = operation.outputs[0].shape, _aligned(operation, at, share.dim)
    if len(operation.inputs) < 2:
        yield from ((Link(True, 0), Share(dim, share.scales)), (OUT, Share(dim, share.scales)))
        return
    factors = [i for i, v in enumerate(operation.inputs) if _size_at(v, shape, dim) == 1]
    if factors == [0] and operation.kind.startswith("div"):
        raise _offence(operation, at)
    if len(factors) == 1 and at != Link(True, factors[0]):
        streamed = 1 - factors[0]
        own = dim - (len(shape) - len(operation.inputs[streamed].shape))
        yield Link(True, streamed), Share(own, share.scales)
        yield OUT, Share(dim, share.scales)
        return
    scale = next((i for i, v in enumerate(operation.inputs) if _scale_of(v, shape[dim])), None)
    if scale is None or not operation.kind.startswith("mul") or at == Link(True, scale):
        raise Offence("each channel is multiplied by something of its own", operation)
    name = _scale_of(operation.inputs[scale], shape[dim])
    streamed = 1 - scale
    if at.of_input and share.scales[-1:] != (name,):
        raise Offence("each channel is scaled after it was written", operation)
    outer = share.scales[:-1] if at.of_input else share.scales
    yield Link(True, streamed), Share(dim - (len(shape) - len(operation.inputs[streamed].shape)), (*outer, name))
    yield OUT, Share(dim, outer)


def _size_at(value: Any, shape: tuple[int, ...], dim: int) -> int:
    own = dim - (len(shape) - len(value.shape))
    return 1 if own < 0 else int(value.shape[own])


def _scale_of(value: Any, channels: int) -> str:
    """The name of the parameter of one number for each channel that a value is."""
    while not value.name and value.made is not None and value.made.kind in ("view", "_unsafe_view", "unsqueeze"):
        value = value.made.inputs[0]
    return value.name if value.name and math.prod(value.shape) == channels else ""


def _product(operation: Any, at: Link, share: Share) -> Linked:
    """`a @ b`, of matrices or batches of them: rows are a's, columns are b's; what is summed over is no stream."""
    count = len(operation.outputs[0].shape)
    side = {count - 1: 1, count - 2: 0}.get(share.dim)
    if side is None or (at.of_input and at.position != side):
        raise _offence(operation, at)
    yield Link(True, side), share
    yield OUT, share


def _affine_product(operation: Any, at: Link, share: Share) -> Linked:
    """`bias + a @ b`: columns, which b and the bias have."""
    last = len(operation.outputs[0].shape) - 1
    bias = len(operation.inputs[0].shape) - 1
    own = {0: bias, 2: last}.get(at.position) if at.of_input else last
    if own != share.dim or operation.inputs[0].shape[bias] != operation.outputs[0].shape[last]:
        raise _offence(operation, at)
    yield Link(True, 0), Share(bias, share.scales)
    yield Link(True, 2), Share(last, share.scales)
    yield OUT, Share(last, share.scales)


def _convolved(operation: Any, at: Link, share: Share) -> Linked:
    """A convolution writes by its weight `(out, in / groups, *)` and its bias; it does not read."""
    own = 1 if not at.of_input else {1: 0, 2: 0}.get(at.position)
    if own != share.dim or operation.given(6):
        raise _offence(operation, at)
    for i in range(1, len(operation.inputs)):
        yield Link(True, i), Share(0, share.scales)
    yield OUT, Share(1, share.scales)


def _embedded(operation: Any, at: Link, share: Share) -> Linked:
    last = len(operation.outputs[0].shape) - 1
    if (at.of_input and at.position) or share.dim != (1 if at.of_input else last):
        raise _offence(operation, at)
    yield Link(True, 0), Share(1, share.scales)
    yield OUT, Share(last, share.scales)


def _nothing(operation: Any, at: Link, share: Share) -> Linked:
    """Zeros, which have no mean."""
    yield at, share


_UNCHANGED = ("clone", "alias", "detach", "_to_copy", "lift_fresh", "contiguous")
CARRIERS: dict[str, Rule] = {
    **dict.fromkeys(_UNCHANGED, _moved(_same, _same)),
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
    "mean": _averaged(),
}
"""What hands values on as they are, or their means: each channel may be scaled and shifted before or after."""

RULES: dict[str, Rule] = {
    **CARRIERS,
    "sum": _averaged(),
    **dict.fromkeys(
        ("upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d", "_upsample_bicubic2d_aa",
         "_upsample_bilinear2d_aa", "avg_pool2d", "_adaptive_avg_pool2d"),
        _images(),
    ),
    "cat": _joined,
    "stack": _stacked,
    "neg": _moved(_same, _same),
    "add": _added,
    "sub": _added,
    "mul": _multiplied,
    "div": _multiplied,
    "mm": _product,
    "bmm": _product,
    "addmm": _affine_product,
    "convolution": _convolved,
    "embedding": _embedded,
    "zeros": _nothing,
    "zeros_like": _nothing,
    "new_zeros": _nothing,
}  # fmt: skip
