"""What feeds each norm, and what follows it.

Two ways to know. `trace` runs the model symbolically with torch.fx; a submodule that does not trace stays a black
box in its parent's graph and is traced by itself, so that the largest submodules that do trace are covered.
`record` runs it once on example inputs and watches every operation. Both yield `Region`s of `Call`s, and `analyse`
draws the same conclusions from either.

One rule rules: a wrong edge destroys a network, a missing one costs two buffers. Doubt means "not foldable".
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .surgery import aliases, evaluating, undisturbed


@dataclass(slots=True)
class Call:
    """One step of a run: `kind` is module, function, input, output or parameter; `inputs` index earlier calls."""

    kind: str
    target: str
    inputs: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None
    input_shape: tuple[int, ...] | None = None


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

Leaf = Callable[[nn.Module], bool]


class _Tracer(fx.Tracer):
    """fx.Tracer that keeps a submodule it cannot trace as one opaque call, instead of giving up."""

    def __init__(self, leaf: Leaf) -> None:
        super().__init__()
        self.leaf = leaf
        self.opaque: list[str] = []
        self.called: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        self.called.add(path)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        last = self.graph._root._prev
        try:
            return forward(*args, **kwargs)
        except Exception:  # a stranger's forward on symbolic values raises whatever it likes
            node = self.graph._root._prev
            while node is not last:
                previous = node._prev
                self.graph.erase_node(node)
                node = previous
            self.opaque.append(path)
            return self.create_proxy("call_module", path, args, kwargs)


def trace(model: nn.Module, leaf: Leaf, *, training: bool = False) -> Traced:
    """Run `model` symbolically. `leaf` says which modules are taken whole (norms, and layers that can be folded)."""
    traced = Traced()
    with evaluating(model, training), undisturbed(model):
        _trace_below(model, "", leaf, traced)
    return traced


def _trace_below(module: nn.Module, path: str, leaf: Leaf, traced: Traced) -> None:
    tracer = _Tracer(leaf)
    try:
        graph = tracer.trace(module)
    except Exception:  # as above
        opaque = [""]
    else:
        opaque = tracer.opaque
        traced.regions.append(Region(path, _calls_of(graph, path)))
    # A subtree erased as opaque may have been entered before: only the outermost opaque modules count.
    outer = [p for p in opaque if not any(p != q and is_below(p, q) for q in opaque)]
    for inner in dict.fromkeys(outer):
        _trace_children(module.get_submodule(inner), _join(path, inner), inner, tracer.called, leaf, traced)


def _trace_children(
    owner: nn.Module, path: str, local: str, called: set[str], leaf: Leaf, traced: Traced
) -> None:
    """Trace the children of a module whose own forward does not trace, where it is known to call them whole."""
    uses = _uses_of(owner)
    for name, child in owner._modules.items():
        if child is None or leaf(child):
            continue
        child_path, child_local = _join(path, name), _join(local, name)
        if uses is None or name in uses.reached_into:
            traced.doubtful.add(child_path)
        seen = child_local in called or (uses is not None and name in uses.called)
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or (isinstance(child, nn.Sequential) and not seen):
            # Its owner may call the elements one by one and keep what lies between them.
            _trace_children(child, child_path, child_local, called, leaf, traced)
        else:
            _trace_below(child, child_path, leaf, traced)


def _calls_of(graph: fx.Graph, root: str) -> list[Call]:
    index: dict[fx.Node, int] = {}
    calls: list[Call] = []
    for node in graph.nodes:
        if _is_metadata(node):
            continue
        kind, target = _kind_of(node, root)
        index[node] = len(calls)
        calls.append(Call(kind, target, tuple(index[n] for n in node.all_input_nodes if n in index)))
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


@dataclass
class _Uses:
    """How a class's code uses its children: called whole, and reached into."""

    called: set[str]
    reached_into: set[str]


def _uses_of(module: nn.Module) -> _Uses | None:
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return _Uses(set(), set())
    chains = _chains_of(type(module))
    if chains is None:
        return None
    uses = _Uses(set(), set())
    for chain, is_called in chains:
        child = module._modules.get(chain[0])
        if child is None:
            continue
        if len(chain) == 1 and is_called:
            uses.called.add(chain[0])
        elif len(chain) > 1 and isinstance(child._modules.get(chain[1]), nn.Module):
            uses.reached_into.add(chain[0])
    return uses


@functools.lru_cache(maxsize=None)
def _chains_of(cls: type) -> tuple[tuple[tuple[str, ...], bool], ...] | None:
    """Every `self.a.b.c` in the methods of a class and its bases, and whether it is called; None without source."""
    chains: list[tuple[tuple[str, ...], bool]] = []
    for base in cls.__mro__:
        if base.__module__.startswith("torch.nn") or base is object:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            return None
        methods = [n for n in tree.body[0].body if not (isinstance(n, ast.FunctionDef) and n.name == "__init__")]
        nodes = [node for method in methods for node in ast.walk(method)]
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and (names := _self_chain(node)):
                chains.append((names, id(node) in called))
    return tuple(chains)


def _self_chain(node: ast.expr) -> tuple[str, ...]:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ()


# --- recorded ---------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Watches a run: every operation outside the watched modules, and each watched module as one call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.made_by: dict[int, int] = {}
        self.alive: list[Tensor] = []  # ids are unique only while their tensors live
        self.depth = 0

    def source_of(self, tensor: Tensor) -> int:
        index = self.made_by.get(id(tensor))
        if index is None:
            index = self.add("input", "", (), [tensor])
        return index

    def add(self, kind: str, target: str, inputs: Iterable[int], outputs: Iterable[Tensor]) -> int:
        outputs = list(outputs)
        shape = tuple(outputs[0].shape) if outputs else None
        self.calls.append(Call(kind, target, tuple(inputs), shape))
        for tensor in outputs:
            self.made_by[id(tensor)] = len(self.calls) - 1
            self.alive.append(tensor)
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
    recorder = _Recorder()
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
        recorder.add("output", "", [recorder.source_of(t) for t in _tensors(out)], ())
    return Region("", recorder.calls)
