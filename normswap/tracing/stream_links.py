"""How each of torch's operations hands a stream's channels on: what else is in a stream when one of its tensors is.

An operation may be passed where taking the mean of channels out of some of its tensors takes it out of its result, and
out of nothing else: it is linear in them and treats all channels alike.
"""

from __future__ import annotations

import math
from typing import Any

from .stream_moves import (
    CARRIERS,
    OUT,
    Link,
    Linked,
    Offence,
    Rule,
    Share,
    averaged,
    images,
    moved,
    offence,
    same,
    value_at,
)

LAYER_NORM = "native_layer_norm"


def links(operation: Any, at: Link, share: Share) -> Linked:
    """The tensors of an operation that are in a stream because the one `at` is; it is itself among them.

    Raises Offence where the operation does something else with it.
    """
    rule = RULES.get(operation.kind.removesuffix("_"))
    if rule is None:
        raise offence(operation, at)
    return rule(operation, at, share)


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
    return dim + len(operation.outputs[0].shape) - len(value_at(operation, at).shape)


def _multiplied(operation: Any, at: Link, share: Share) -> Linked:
    """A product with a number, or with what is the same for all channels; or a layer scale."""
    shape, dim = operation.outputs[0].shape, _aligned(operation, at, share.dim)
    if len(operation.inputs) < 2:
        yield from ((Link(True, 0), Share(dim, share.scales)), (OUT, Share(dim, share.scales)))
        return
    factors = [i for i, v in enumerate(operation.inputs) if _size_at(v, shape, dim) == 1]
    if factors == [0] and operation.kind.startswith("div"):
        raise offence(operation, at)
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
        raise offence(operation, at)
    yield Link(True, side), share
    yield OUT, share


def _affine_product(operation: Any, at: Link, share: Share) -> Linked:
    """`bias + a @ b`: columns, which b and the bias have."""
    last = len(operation.outputs[0].shape) - 1
    bias = len(operation.inputs[0].shape) - 1
    own = {0: bias, 2: last}.get(at.position) if at.of_input else last
    if own != share.dim or operation.inputs[0].shape[bias] != operation.outputs[0].shape[last]:
        raise offence(operation, at)
    yield Link(True, 0), Share(bias, share.scales)
    yield Link(True, 2), Share(last, share.scales)
    yield OUT, Share(last, share.scales)


def _convolved(operation: Any, at: Link, share: Share) -> Linked:
    """A convolution writes by its weight `(out, in / groups, *)` and its bias; it does not read."""
    own = 1 if not at.of_input else {1: 0, 2: 0}.get(at.position)
    if own != share.dim or operation.given(6) or operation.given(8) != 1:
        raise offence(operation, at)  # transposed, or in groups, of which each has inputs of its own
    for i in range(1, len(operation.inputs)):
        yield Link(True, i), Share(0, share.scales)
    yield OUT, Share(1, share.scales)


def _embedded(operation: Any, at: Link, share: Share) -> Linked:
    last = len(operation.outputs[0].shape) - 1
    if (at.of_input and at.position) or share.dim != (1 if at.of_input else last):
        raise offence(operation, at)
    yield Link(True, 0), Share(1, share.scales)
    yield OUT, Share(last, share.scales)


def _nothing(operation: Any, at: Link, share: Share) -> Linked:
    """Zeros, which have no mean."""
    yield at, share


RULES: dict[str, Rule] = {
    **CARRIERS,
    "sum": averaged(),
    **dict.fromkeys(
        ("upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d", "_upsample_bicubic2d_aa",
         "_upsample_bilinear2d_aa", "avg_pool2d", "_adaptive_avg_pool2d"),
        images(),
    ),
    "cat": _joined,
    "stack": _stacked,
    "neg": moved(same, same),
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
