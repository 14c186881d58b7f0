"""What feeds each norm, and what follows it.

Two ways to know. `trace` runs the model symbolically with torch.fx, in every way that its code can go; a submodule
that does not trace stays a black box in its parent's graph and is traced by itself, so that the largest submodules
that do trace are covered. `record` runs it once on example inputs and watches every operation. Both yield `Region`s of
`Call`s, and `analyse` draws its conclusions from all of them together: what either shows counts.

One rule rules: a wrong edge destroys a network, a missing one costs two buffers. Doubt means "not foldable".
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .memory import Span, overlap, span_of, storage_of
from .surgery import evaluating, kept_by, undisturbed
from .uses import ALL, doubtful_below, uses_of
from .ways import Leaf, Tracer, kept_on_modules


@dataclass(slots=True)
class Call:
    """One step of a run: `kind` is module, function, input, output or parameter; `inputs` index earlier calls.

    way: what would have to be otherwise for the code to get here, such as "with raw=True"; empty for what it does as
    it stands.
    """

    kind: str
    target: str
    inputs: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None
    input_shape: tuple[int, ...] | None = None
    way: str = ""


@dataclass
class Region:
    """The calls of one run of the module at `path` (paths in calls are from the model's root)."""

    path: str
    calls: list[Call]


@dataclass
class Traced:
    """What a symbolic run found: regions, and modules whose use outside of them is not known."""

    regions: list[Region] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)


# --- symbolic ---------------------------------------------------------------------------------------------------


def trace(model: nn.Module, leaf: Leaf) -> Traced:
    """Run `model` symbolically, in eval mode first, in every way that its code can go.

    `leaf` says which modules are taken whole (norms, and layers that can be folded).
    """
    traced = Traced()
    with evaluating(model):
        _trace_below(model, "", leaf, traced)
    return traced


def _trace_below(module: nn.Module, path: str, leaf: Leaf, traced: Traced) -> None:
    tracer = Tracer(leaf)
    try:
        with undisturbed(module):
            graph = tracer.trace(module)
            calls = _calls_of(graph, path, {"": kept_on_modules(module), **tracer.given}, tracer.way_of)
    except Exception:  # as above
        opaque = [""]
    else:
        opaque = tracer.untraced()
        traced.regions.append(Region(path, calls))
    # A subtree erased as opaque may have been entered before: only the outermost opaque modules count.
    outer = [p for p in opaque if not any(p != q and is_below(p, q) for q in opaque)]
    for inner in dict.fromkeys(outer):
        _trace_children(module.get_submodule(inner), _join(path, inner), inner, tracer.called, leaf, traced)


def _trace_children(
    owner: nn.Module, path: str, local: str, called: Collection[str], leaf: Leaf, traced: Traced
) -> None:
    """Trace the children of a module whose own forward does not trace, where it is known to call them whole."""
    uses = uses_of(owner)
    for name, child in owner._modules.items():
        if child is None:
            continue
        child_path, child_local = _join(path, name), _join(local, name)
        traced.doubtful.update(_join(path, below) for below in doubtful_below(owner, uses, name, leaf))
        if leaf(child):
            traced.doubtful.add(child_path)  # a run of the owner that did trace need not be the only one
            continue
        seen = (child_local in called or name in uses.called) and not uses.loose & {name, ALL}
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or (isinstance(child, nn.Sequential) and not seen):
            # Its owner may call the elements one by one and keep what lies between them.
            _trace_children(child, child_path, child_local, called, leaf, traced)
        else:
            _trace_below(child, child_path, leaf, traced)


def _calls_of(
    graph: fx.Graph, root: str, kept: Mapping[str, Collection[fx.Node]], way_of: Mapping[fx.Node, str]
) -> list[Call]:
    """kept: what is used beside, by way."""
    index: dict[fx.Node, int] = {}
    calls: list[Call] = []
    for node in graph.nodes:
        if _is_metadata(node):
            continue
        kind, target = _kind_of(node, root)
        index[node] = len(calls)
        inputs = tuple(index[n] for n in node.all_input_nodes if n in index)
        calls.append(Call(kind, target, inputs, way=way_of.get(node, "")))
    for way, nodes in kept.items():
        calls.append(Call("output", "", tuple(index[n] for n in nodes if n in index), way=way))
    return calls


_METADATA_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout"}
_METADATA_METHODS = {"size", "dim", "numel", "stride", "is_contiguous", "get_device", "element_size"}


def _is_metadata(node: fx.Node) -> bool:
    """Reading a tensor's shape or dtype does not use its values."""
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA_ATTRIBUTES


def _kind_of(node: fx.Node, root: str) -> tuple[str, str]:
    if node.op == "call_module":
        return "module", _join(root, str(node.target))
    if node.op == "get_attr":
        return "parameter", _join(root, str(node.target))
    if node.op == "placeholder":
        return "input", str(node.target)
    if node.op == "output":
        return "output", ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return "function", str(name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def is_below(path: str, ancestor: str) -> bool:
    return ancestor == "" or path == ancestor or path.startswith(ancestor + ".")


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
