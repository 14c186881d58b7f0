"""Run a network symbolically with torch.fx.

A submodule that does not trace stays a black box in its parent's graph and is traced by itself, so that the largest
submodules that do trace are covered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from ..modules.gains import computed_weights
from ..modules.restore import evaluating, undisturbed
from .between import dims_cut
from .code_paths import Leaf, Tracer, kept_on_modules
from .moves import is_move
from .ranks import rank_given
from .run import Call, Region, is_below, join
from .source_reading import ALL, doubtful_below, uses_of


@dataclass(frozen=True)
class Doubt:
    """Why the use of a module is not known: `owner` is the path of the module whose code may use it elsewhere.

    read: that code reaches into the module, by a name that leads to layers. leaf: it calls the layer itself, and so
    sees what the layer puts out.
    """

    owner: str
    read: bool = False
    leaf: bool = False


@dataclass
class Traced:
    """What a symbolic run found: regions, and modules whose use outside of them is not known, by their paths."""

    regions: list[Region] = field(default_factory=list)
    doubtful: dict[str, set[Doubt]] = field(default_factory=lambda: defaultdict(set))


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
            for layer in computed_weights(module):
                # As a parameter for the while, because nobody sees how a tensor in an attribute is read.
                layer._parameters["weight"] = nn.Parameter(layer.__dict__.pop("weight").detach())
            graph = tracer.trace(module)
            region = _region_of(graph, path, {"": kept_on_modules(module), **tracer.given}, tracer)
    except Exception:  # as above
        opaque = [""]
    else:
        opaque = tracer.untraced()
        traced.regions.append(region)
    # A subtree erased as opaque may have been entered before: only the outermost opaque modules count.
    outer = [p for p in opaque if not any(p != q and is_below(p, q) for q in opaque)]
    for inner in dict.fromkeys(outer):
        owner = join(path, inner)
        _trace_children(module.get_submodule(inner), owner, inner, tracer.called, leaf, traced, owner)


def _trace_children(
    owner: nn.Module, path: str, local: str, called: Collection[str], leaf: Leaf, traced: Traced, code: str
) -> None:
    """Trace the children of a module whose own forward does not trace, where it is known to call them whole.

    code: the path of the module whose code calls them; that of what holds `owner`, if this is but a list of them.
    """
    uses = uses_of(owner)
    for name, child in owner._modules.items():
        if child is None:
            continue
        child_path, child_local = join(path, name), join(local, name)
        for below, read in doubtful_below(owner, uses, name, leaf):
            traced.doubtful[join(path, below)].add(Doubt(code, read=read))
        if leaf(child):  # a run of the owner that did trace need not be the only one
            traced.doubtful[child_path].add(Doubt(code, leaf=True))
            continue
        seen = (child_local in called or name in uses.called) and not uses.iterated & {name, ALL}
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or (isinstance(child, nn.Sequential) and not seen):
            # Its owner may call the elements one by one and keep what lies between them.
            _trace_children(child, child_path, child_local, called, leaf, traced, code)
        else:
            _trace_below(child, child_path, leaf, traced)


def _region_of(graph: fx.Graph, root: str, kept: Mapping[str, Collection[fx.Node]], tracer: Tracer) -> Region:
    """kept: what is used beside, by way."""
    index: dict[fx.Node, int] = {}
    calls: list[Call] = []
    for node in graph.nodes:
        if _is_metadata(node):
            continue
        kind, target = _kind_of(node, root)
        index[node] = len(calls)
        inputs = tuple(index[n] for n in node.all_input_nodes if n in index)
        call = Call(kind, target, inputs, way=tracer.way_of.get(node, ""), same=node in tracer.same)
        call.rank, call.moves, call.cuts = rank_given(node), is_move(node), dims_cut(node)
        call.by = join(root, tracer.made_by[node]) if node in tracer.made_by else ""
        calls.append(call)
    for way, nodes in kept.items():
        calls.append(Call("output", "", tuple(index[n] for n in nodes if n in index), way=way))
    return Region(root, calls, [[index.get(node) for node in nodes] for nodes in tracer.alike])


_METADATA_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout"}
_METADATA_METHODS = {"size", "dim", "numel", "stride", "is_contiguous", "get_device", "element_size"}


def _is_metadata(node: fx.Node) -> bool:
    """Reading a tensor's shape or dtype does not use its values."""
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA_ATTRIBUTES


def _kind_of(node: fx.Node, root: str) -> tuple[str, str]:
    if node.op == "call_module":
        return "module", join(root, str(node.target))
    if node.op == "get_attr":
        return "parameter", join(root, str(node.target))
    if node.op == "placeholder":
        return "input", str(node.target)
    if node.op == "output":
        return "output", ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return "function", str(name)
