"""Who reads what a norm gives: the linear layers that its gamma and beta can go into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .stream import Operation, Run, Value
from .stream_links import links
from .stream_moves import CARRIERS, Link, Offence, Share

_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2)}
"""Which input of a product the values are, and which the weight."""


@dataclass(frozen=True)
class Reader:
    """A linear layer that reads a norm's output.

    weight, bias: names of its parameters; the bias may be yet to be made. dim: of the weight, the one summed over.
    """

    weight: str
    dim: int
    bias: str


def readers_of(run: Run, norm: str) -> tuple[Reader, ...]:
    """The layers that read what the norm at a path gives. Raises Offence where somebody else does, too."""
    if norm not in run.given:
        raise Offence("no run shows who reads it")
    ends = [end for value in run.given[norm] for end in _ends(value, Share(len(value.shape) - 1))]
    taken = {operation for operation, _, _ in ends}
    sums = {after for operation in taken for after in _uses(operation.outputs[0]) if after.kind in _SUMS}
    found: dict[str, Reader] = {}
    for operation, position, share in ends:
        reader = _reader(operation, position, share)
        _check_sole(run, reader.weight, taken)
        _check_sole(run, reader.bias, taken | sums)
        if found.setdefault(reader.weight, reader) != reader:
            raise Offence(f"{reader.weight} reads it in two ways", operation)
    if len({reader.bias for reader in found.values()}) < len(found):
        raise Offence("two layers that read it share a bias")
    return tuple(found.values())


def _ends(value: Value, share: Share) -> Iterator[tuple[Operation, int, Share]]:
    """The operations that do more with a value than to hand it on, which of their inputs it is, and its channels."""
    if value.output:
        raise Offence("the network gives it, or keeps it, as it is", value.made)
    for operation, position in value.read:
        if operation.kind in CARRIERS:
            for link, other in links(operation, Link(True, position), share):
                if not link.of_input:
                    yield from _ends(operation.outputs[link.position], other)
        else:
            yield operation, position, share


def _reader(operation: Operation, position: int, share: Share) -> Reader:
    if operation.kind == "convolution" and position == 0 and share.dim == 1:
        if operation.given(6) or operation.given(8) != 1 or any(operation.given(4)):
            raise Offence("a convolution with padding or groups reads it", operation)
        weight, dim = _parameter(operation.inputs[1], 1, operation)
    elif operation.kind in _PRODUCTS and position == _PRODUCTS[operation.kind][0] and share.dim == 1:
        weight, dim = _parameter(operation.inputs[_PRODUCTS[operation.kind][1]], 0, operation)
    else:
        raise Offence("it is read by what is no linear layer", operation)
    return Reader(weight, dim, _bias_of(operation, weight))


_SUMS = ("add", "add_")


def _bias_of(operation: Operation, weight: str) -> str:
    """The bias that is added to a product; where there is none, the one that the module which ran would take."""
    if len(operation.inputs) == 3:
        return _parameter(operation.inputs[0 if operation.kind == "addmm" else 2], 0, operation)[0]
    out = operation.outputs[0]
    for after in _uses(out):
        for summand in after.inputs if after.kind in _SUMS else ():
            if summand.name and summand.shape == out.shape[-1:]:
                return summand.name
    module, _, own = weight.rpartition(".")
    if module != operation.where or not own.endswith("weight"):
        raise Offence(f"{weight} is used by another module than its own, without a bias", operation)
    return f"{module}.{own.removesuffix('weight')}bias".removeprefix(".")


def _parameter(value: Value, dim: int, operation: Operation) -> tuple[str, int]:
    """The parameter that a value is, in another form, and the dimension that one of the value's is of it."""
    while not value.name and value.made is not None and value.made.kind in CARRIERS:
        position = value.made.outputs.index(value)
        back = dict(links(value.made, Link(False, position), Share(dim)))
        value, dim = value.made.inputs[0], back[Link(True, 0)].dim
    if not value.name:
        raise Offence("it is multiplied by what is no parameter", operation)
    return value.name, dim


def _check_sole(run: Run, name: str, taken: set[Operation]) -> None:
    """Refuse a parameter that something else than these operations uses."""
    for operation in run.operations:
        for value in operation.inputs:
            if value.name == name and not taken.issuperset(_uses(value)):
                raise Offence(f"{name} reads other values, too", operation)


def _uses(value: Value) -> Iterator[Operation]:
    for operation, _ in value.read:
        if operation.kind in CARRIERS:
            for out in operation.outputs:
                yield from _uses(out)
        else:
            yield operation
