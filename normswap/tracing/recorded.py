"""Run a network once on example inputs and watch every operation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..modules.attributes import tensors_kept_by
from ..modules.gains import kept_weight
from ..modules.restore import evaluating, undisturbed
from ..modules.storage import Origins
from .between import hooked_between, was_cut
from .executed import Execution
from .moves import was_move
from .run import Call, Region

# --- recorded ---------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Watches a run: every operation outside the watched modules, and each watched module as one call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.origins = Origins(model)
        self.depth = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: skipping it means importing it, which takes seconds. An older torch does not ask."""
        return False

    def source_of(self, tensor: Tensor) -> int:
        index = self.origins.of(tensor)
        if index is not None:
            return index
        for name in self.origins.parameters_in(tensor):
            index = self._note(Call("parameter", name, (), tuple(tensor.shape)), [tensor])
        if index is None:
            index = self.origins.of_memory(tensor)
        return self.add("input", "", (), [tensor]) if index is None else index

    def add(self, kind: str, target: str, inputs: Iterable[int], outputs: Iterable[Tensor]) -> int:
        outputs = list(outputs)
        return self._note(Call(kind, target, tuple(inputs), tuple(outputs[0].shape) if outputs else None), outputs)

    def _note(self, call: Call, outputs: Iterable[Tensor]) -> int:
        self.calls.append(call)
        self.origins.note(outputs, len(self.calls) - 1, fills=call.kind != "parameter")
        return len(self.calls) - 1

    def seen(self, tensors: Iterable[Tensor]) -> None:
        """Note what hooks are given, which may do anything with it."""
        if self.depth == 0:
            self.add("output", "", [self.source_of(t) for t in tensors], ())

    def note_weight(self, layer: nn.Module, path: str) -> None:
        """Know a weight that the layer has computed and keeps, should anything else read it."""
        if (weight := kept_weight(layer)) is not None:
            self.origins.note_parameter(f"{path}.weight", weight)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.depth == 0:
            inputs = [self.source_of(t) for t in _tensors((args, kwargs))]
            name = func.overloadpacket.__name__
            index = self.add("function", name, inputs, _tensors(out))
            self.calls[index].moves, self.calls[index].cuts = was_move(name, args, out), int(was_cut(name, args, out))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def record(
    model: nn.Module,
    inputs: tuple[Any, ...],
    watched: Mapping[nn.Module, str],
    execution: Execution | None = None,
) -> Region:
    """Run `model(*inputs)` once in eval mode, without gradients, and note what flows into what.

    `watched` maps the modules taken whole to their paths; `execution` follows the code that calls them. Module
    attributes, buffers, training flags and the random state are as before afterwards.
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
        recorder.note_weight(module, watched[module])
        recorder.depth -= 1
        if recorder.depth == 0:
            sources, shape = entered.pop()
            made = _tensors(out)
            index = recorder.add("module", watched[module], sources, made)
            recorder.calls[index].input_shape = shape
            if execution is not None:
                execution.made(module, made)

    def seen_before(module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.seen(_tensors((args, kwargs)))

    def seen_after(module: nn.Module, args: Any, out: Any) -> None:
        recorder.seen(_tensors(out))

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        for module, path in watched.items():
            recorder.note_weight(module, path)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        for module in nn.Module.modules(model):
            if hooked_between(module, watched.__contains__):
                stack.callback(module.register_forward_pre_hook(seen_before, with_kwargs=True, prepend=True).remove)
                stack.callback(module.register_forward_hook(seen_after).remove)
        stack.enter_context(recorder)
        with nullcontext() if execution is None else execution.followed.watching():
            out = model(*inputs)
        # What is kept on a module may be used later, like an output.
        held = tensors_kept_by(model)
        kept = recorder.origins.known(held)
        recorder.add("output", "", [recorder.source_of(t) for t in (*_tensors(out), *kept)], ())
    return Region("", recorder.calls)
