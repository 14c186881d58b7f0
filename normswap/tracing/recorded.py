"""Run a network once on example inputs and watch every operation."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..modules.attributes import kept_by
from ..modules.restore import evaluating, undisturbed
from ..modules.storage import Span, overlap, span_of, storage_of
from .run import Call, Region

# --- recorded ---------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Watches a run: every operation outside the watched modules, and each watched module as one call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        # A run would take many times its memory if it kept its tensors, so ids and addresses are used again by others.
        # Each goes with a weak reference to what it stood for, and means nothing once that is gone.
        self.made_by: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.filled_by: dict[int, tuple[StorageWeakRef, int]] = {}  # for views no operation announces (`x.data`)
        self.parameters: dict[int, list[tuple[Span, str]]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if (span := span_of(parameter)) is not None:
                self.parameters[span[0]].append((span, name))
        self.depth = 0

    def source_of(self, tensor: Tensor) -> int:
        index = self.made(tensor)
        if index is None:
            index = self.parameters_in(tensor)
        if index is None:
            index = self.known(tensor)
        return self.add("input", "", (), [tensor]) if index is None else index

    def parameters_in(self, tensor: Tensor) -> int | None:
        """A use of every parameter that has bytes of the tensor's memory."""
        span = span_of(tensor)
        for own, name in self.parameters.get(span[0], ()) if span is not None else ():
            if overlap(span, own):
                self.calls.append(Call("parameter", name, (), tuple(tensor.shape)))
                self.made_by[id(tensor)] = weakref.ref(tensor), len(self.calls) - 1
        return self.made(tensor)

    def made(self, tensor: Tensor) -> int | None:
        """The call that made a tensor, if one has."""
        made, index = self.made_by.get(id(tensor), (None, -1))
        return index if made is not None and made() is tensor else None

    def known(self, tensor: Tensor) -> int | None:
        """The call that made a tensor, or filled its memory; None if none of them has."""
        index = self.made(tensor)
        if index is not None:
            return index
        filled, index = self.filled_by.get(storage_of(tensor), (None, -1))
        return None if filled is None or filled.expired() else index

    def add(self, kind: str, target: str, inputs: Iterable[int], outputs: Iterable[Tensor]) -> int:
        outputs = list(outputs)
        shape = tuple(outputs[0].shape) if outputs else None
        self.calls.append(Call(kind, target, tuple(inputs), shape))
        for tensor in outputs:
            self.made_by[id(tensor)] = weakref.ref(tensor), len(self.calls) - 1
            if memory := storage_of(tensor):
                self.filled_by[memory] = StorageWeakRef(tensor.untyped_storage()), len(self.calls) - 1
        return len(self.calls) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.depth == 0:
            inputs = [self.source_of(t) for t in _tensors((args, kwargs))]
            self.add("function", func.overloadpacket.__name__, inputs, _tensors(out))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def record(model: nn.Module, inputs: tuple[Any, ...], watched: Mapping[nn.Module, str]) -> Region:
    """Run `model(*inputs)` once in eval mode, without gradients, and note what flows into what.

    `watched` maps the modules taken whole to their paths. Module attributes, buffers, training flags and the random
    state are as before afterwards.
    """
    recorder = _Recorder(model)
    entered: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = _tensors((args, kwargs))
        if recorder.depth == 0:
            sources = tuple(recorder.source_of(t) for t in tensors)
            entered.append((sources, tuple(tensors[0].shape) if tensors else None))
        recorder.depth += 1

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        recorder.depth -= 1
        if recorder.depth == 0:
            sources, shape = entered.pop()
            index = recorder.add("module", watched[module], sources, _tensors(out))
            recorder.calls[index].input_shape = shape

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        for module in watched:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        stack.enter_context(recorder)
        out = model(*inputs)
        # What is kept on a module may be used later, like an output.
        kept = [t for t in _attributes(model) if recorder.known(t) is not None]
        recorder.add("output", "", [recorder.source_of(t) for t in (*_tensors(out), *kept)], ())
    return Region("", recorder.calls)


def _attributes(model: nn.Module) -> list[Tensor]:
    """Tensors that modules hold in attributes which are not parameters."""
    held = chain(kept_by(model), model.buffers())
    return [value for value in held if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)]
