"""Residual streams: the values that layer norms read, what writes them, and who else reads them.

A layer norm sees only the difference of each channel from their mean. If everything that writes a stream leaves that
mean out by itself, nothing that reads it through a layer norm sees a change, and the layer norm may be an RMSNorm
(Jiang et al. 2023, arXiv:2305.14858). Here it is proved, operation by operation of a recorded run, that taking the mean
out of some parameters takes it out of the whole stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..modules.attributes import tensors_kept_by
from ..modules.restore import evaluating, undisturbed
from .stream_links import LAYER_NORM, links
from .stream_moves import CARRIERS, Link, Offence, Share


@dataclass(eq=False)
class Value:
    """A tensor of a run. made: what gave it, None for parameters and inputs; name: of a parameter.

    read: by which operations, and as which of their inputs.
    """

    shape: tuple[int, ...]
    made: Operation | None = None
    name: str = ""
    memory: int = 0
    read: list[tuple[Operation, int]] = field(default_factory=list)
    output: bool = False


@dataclass(eq=False)
class Operation:
    """One operation of torch's own, at its place in the run: what it was given, and what it gave.

    arguments: as it was called, tensors among them; inputs: the values of these in their order. where: the innermost
    module that ran.
    """

    index: int
    kind: str
    arguments: tuple[Any, ...]
    inputs: list[Value]
    where: str
    outputs: list[Value] = field(default_factory=list)

    def given(self, position: int, default: Any = None) -> Any:
        """An argument by its position, or what it is by default."""
        arguments = self.arguments[0]
        return arguments[position] if len(arguments) > position else default


class _Recorder(TorchDispatchMode):
    """Watches every operation of a run, and in which module it happens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.values = WeakIdKeyDictionary()
        self.operations: list[Operation] = []
        self.within: list[str] = [""]
        for name, parameter in model.named_parameters():
            self.values[parameter] = Value(tuple(parameter.shape), name=name)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def value(self, tensor: Tensor) -> Value:
        if tensor not in self.values:
            self.values[tensor] = Value(tuple(tensor.shape), memory=_memory(tensor))
        return self.values[tensor]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs))
        inputs = [self.value(t) for t in given]
        out = func(*args, **(kwargs or {}))
        kind = func.overloadpacket.__name__
        told = tuple(pytree.tree_map(lambda x: _HERE if isinstance(x, Tensor) else x, (args, kwargs or {})))
        operation = Operation(len(self.operations), kind, told, inputs, self.within[-1])
        self.operations.append(operation)
        for i, value in enumerate(inputs):
            value.read.append((operation, i))
        for tensor in _tensors(out):
            operation.outputs.append(Value(tuple(tensor.shape), operation, memory=_memory(tensor)))
            self.values[tensor] = operation.outputs[-1]
        return out


_HERE = object()
"""Stands for a tensor in `Operation.arguments`; the values are its `inputs`, in the same order."""


def _memory(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Stream:
    """What a layer norm reads. writers: the parameters to take the mean of channels out of; empty where that cannot
    be, for the reason in `problem`."""

    writers: Mapping[str, Share] = field(default_factory=dict)
    problem: str = ""


class Run:
    """A recorded run of a network, to be asked about its streams.

    operations: all of them in their order. norms: by path of a module, what the layer norms in it were given.
    given: by path of a module, what it gave, of those that give one tensor.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.operations, self.given = _recorded(model, inputs)
        self.norms: dict[str, list[Value]] = {}
        for operation in self.operations:
            if operation.kind == LAYER_NORM:
                self.norms.setdefault(operation.where, []).append(operation.inputs[0])
        self._streams: dict[Value, Stream] = {}
        self._read_names = {value.name for operation in self.operations for value in operation.inputs if value.name}
        self._readers: dict[int, list[Operation]] = {}
        for operation in self.operations:
            for value in operation.inputs:
                self._readers.setdefault(value.memory, []).append(operation)

    def reads(self, name: str) -> bool:
        """Whether some operation of the run read the parameter of that name."""
        return name in self._read_names

    def stream(self, norm: str) -> Stream:
        """The stream that the layer norm at that path reads."""
        if norm not in self.norms:
            return Stream(problem="no layer norm runs there")
        if all(value in self._streams for value in self.norms[norm]):
            return self._streams[self.norms[norm][0]]
        shares: dict[Value, Share] = {}
        todo = [(value, Share(len(value.shape) - 1)) for value in self.norms[norm]]
        try:
            while todo:
                value, share = todo.pop()
                if shares.get(value, share) != share:
                    raise Offence("is read as channels in two ways", value.made)
                if value not in shares:
                    shares[value] = share
                    todo += self._neighbours(value, share)
        except Offence as offence:
            return Stream(problem=str(offence))
        found = Stream({value.name: share for value, share in shares.items() if value.name})
        self._streams.update(dict.fromkeys(shares, found))
        return found

    def _neighbours(self, value: Value, share: Share) -> Iterator[tuple[Value, Share]]:
        """What else must be in a stream that a value is in. Raises Offence for what cannot be."""
        if value.output:
            raise Offence("the network gives it, or keeps it, as it is", value.made)
        if value.made is not None:
            yield from self._linked(value.made, Link(False, value.made.outputs.index(value)), share)
        elif not value.name:
            raise Offence("the network's input or a constant is written to it", value.read[0][0])
        try:
            yield from self._read(value, share)
        except Offence as offence:
            name = _parameter_of(value)
            raise (Offence(f"{name} writes to it, and elsewhere {offence}") if name else offence) from None

    def _read(self, value: Value, share: Share) -> Iterator[tuple[Value, Share]]:
        for operation, position in value.read:
            if operation.kind == LAYER_NORM and position == 0:
                if share != Share(len(value.shape) - 1) or list(operation.given(1)) != [value.shape[-1]]:
                    raise Offence("it is normalised over other dimensions", operation)
            else:
                yield from self._linked(operation, Link(True, position), share)

    def _linked(self, operation: Operation, at: Link, share: Share) -> Iterator[tuple[Value, Share]]:
        self._check_memory(operation)
        for link, other in links(operation, at, share):
            yield (operation.inputs if link.of_input else operation.outputs)[link.position], other

    def _check_memory(self, operation: Operation) -> None:
        """Refuse what writes into memory that is read by another name afterwards."""
        if not operation.kind.endswith("_") or operation.kind.endswith("__"):
            return
        memory = operation.inputs[0].memory
        for other in self._readers.get(memory, ()) if memory else ():
            for value in other.inputs if other.index > operation.index else ():
                made = -1 if value.made is None else value.made.index
                if value.memory == memory and made < operation.index:
                    raise Offence("it is written over while something else reads it", operation)


def _parameter_of(value: Value) -> str:
    """The name of the parameter that a value is in another form; empty for most."""
    while not value.name and value.made is not None and value.made.kind in CARRIERS:
        value = value.made.inputs[0]
    return value.name


def _recorded(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[Operation], dict[str, list[Value]]]:
    """All operations of `model(*inputs)` in eval mode, and what each module gave. The model stays as it was."""
    recorder = _Recorder(model)
    made: dict[str, list[Value]] = {}

    def enter(path: str) -> Callable[..., None]:
        return lambda module, args: recorder.within.append(path)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        path = recorder.within.pop()
        if isinstance(out, Tensor):
            made.setdefault(path, []).append(recorder.value(out))

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        fast = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)  # one operation for a whole layer says nothing
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(path), prepend=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(recorder)
        out = model(*inputs)
        for tensor in (*_tensors(out), *tensors_kept_by(model)):
            if tensor in recorder.values:
                recorder.values[tensor].output = True
    return recorder.operations, made
