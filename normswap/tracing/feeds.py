"""Conclusions from runs: what feeds each norm, and whether its statistics can be folded into it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.utils import parametrize

from ..modules.gains import PARAMETRIZED, foreign_hooks, gain_name, gain_of, layer_of
from .calls import CallGraph, KnownModules
from .residual import ends_branch
from .run import Region, is_below


@dataclass(frozen=True)
class Feed:
    """What one norm's input is.

    kind: `conv`, `conv_transpose`, `linear`, `sum`, `concat`, `input`, `norm`, `other`, or `unknown` (no run showed
    it). producers: paths of the layers the statistics can be folded into, empty unless `foldable`. reason: why it
    is not foldable. last_of_branch: it is the last norm of a residual branch. dims: spatial dimensions of the input;
    positions: their product where a run showed it (1 for a pooled map or a vector).
    """

    kind: str
    producers: tuple[str, ...] = ()
    foldable: bool = False
    reason: str = ""
    last_of_branch: bool = False
    dims: int | None = None
    positions: int | None = None

    @property
    def unsure(self) -> bool:
        """Whether another run may show more of it."""
        return not self.foldable and (self.kind in ("unknown", "other", "input") or self.reason == IN_DOUBT)


IN_DOUBT = "its owner's forward does not trace, and may use the layer elsewhere"
UNKNOWN = Feed("unknown", reason="no run of the network showed what feeds it")


def analyse(
    known: KnownModules, regions: Iterable[Region], doubtful: Iterable[str] = (), settled: Iterable[str] = ()
) -> dict[str, Feed]:
    """What feeds each norm of a network, by its path.

    Every call of a norm and of the layer before it counts, in every region: one use elsewhere, and it is not
    foldable. doubtful: paths of what may be used in ways that no region shows. settled: those among them that the
    runs of the whole network show all uses of, if they get there.
    """
    regions = list(regions)
    runs = [CallGraph(region, known) for region in regions]
    norm_calls: dict[str, list[tuple[CallGraph, int]]] = defaultdict(list)
    layer_users: dict[str, Users] = defaultdict(dict)
    for run in runs:
        for index, name in enumerate(run.names):
            kind = run.calls[index].kind
            if run.norms[index] is not None:
                norm_calls[name].append((run, index))
            elif kind == "parameter" or (kind == "module" and PARAMETRIZED in name):
                what = "bias" if name.endswith(".bias") else "weight"
                _add(layer_users[known.first_name.get(layer_of(name), "")], Elsewhere(what), run.calls[index].way)
            elif kind == "module":
                users = [(run.norms[u], run.calls[u].way) for u in run.readers(index)]
                unread = [] if run.calls[index].same else [(None, run.calls[index].way)]
                for user, way in users or unread:
                    _add(layer_users[name], Elsewhere("output") if user is None else user, way)
    reached = {
        known.first_name.get(c.target, c.target) for region in regions if region.path == "" for c in region.calls
    }
    doubts = Doubts(
        {known.first_name.get(d, d) for d in doubtful}, {known.first_name.get(d, d) for d in settled}, reached
    )
    norms = known.norms
    found = {path: _feed_of(path, known, norm_calls[path], layer_users, doubts) for path in norms if norm_calls[path]}
    called = {name for run in runs for name, call in zip(run.names, run.calls, strict=True) if call.kind == "module"}
    unreached = {p: n for p, n in norms.items() if p not in found and not _has_own(p, n, called, known)}
    return {path: _sure(path, found[path], unreached, called, known) if path in found else UNKNOWN for path in norms}


@dataclass(frozen=True)
class Doubts:
    """What may be used in ways that no run shows, but for what is settled where the runs have reached it."""

    paths: set[str]
    settled: set[str]
    reached: set[str]

    def about(self, path: str) -> bool:
        """Whether one of them concerns the module at a path."""
        return any(is_below(path, d) and (d not in self.settled or path not in self.reached) for d in self.paths)


def _sure(path: str, feed: Feed, unreached: Mapping[str, int], called: set[str], known: KnownModules) -> Feed:
    """The feed, not foldable if the producers may feed something else that no run has reached."""
    for producer in feed.producers:
        layer = known.facts[producer]
        for other, channels in unreached.items():
            if channels == layer.channels and len({layer.dims, known.facts[other].dims} - {None}) < 2:
                reason = f"no run of the network showed what feeds {other}, which may be {producer}"
                return replace(feed, producers=(), foldable=False, reason=reason)
        if other := _instead(path, producer, called, known.modules):
            reason = f"no run of the network called {other}, which may stand in its place"
            return replace(feed, producers=(), foldable=False, reason=reason)
    return feed


def _has_own(path: str, channels: int, called: set[str], known: KnownModules) -> bool:
    """Whether beside a norm that nobody calls there is a layer that nobody calls either, and that fits it."""
    parent = path.rpartition(".")[0]
    beside = (f"{parent}.{name}" if parent else name for name in known.modules[parent]._modules)
    layers = (known.facts[p] for p in beside if p in known.facts and p not in called)
    return any(layer.kind is not None and layer.channels == channels for layer in layers)


def _instead(path: str, producer: str, called: set[str], modules: Mapping[str, nn.Module]) -> str:
    """A part that nobody has called, in a list or dict of parts of which the norm, but not the layer, is in another."""
    parts = path.split(".")
    for n in range(1, len(parts)):
        holder = ".".join(parts[:n])
        if isinstance(modules.get(holder), (nn.ModuleDict, nn.ModuleList)) and not is_below(producer, holder):
            members = [f"{holder}.{name}" for name, child in modules[holder]._modules.items() if child is not None]
            idle = [m for m in members if not any(is_below(name, m) for name in called)]
            if idle:
                return idle[0]
    return ""


@dataclass(frozen=True, order=True)
class Elsewhere:
    """What of a layer is read by other than norms: its `output`, its `weight` or its `bias`."""

    what: str


Users = dict[str | Elsewhere, str]
"""Who reads a layer's output: paths of norms, and what else is read; each with the way that leads there."""


def _add(users: Users, user: str | Elsewhere, way: str) -> None:
    users[user] = min(way, users.get(user, way))  # no way at all, the empty text, comes first


def _feed_of(
    path: str,
    known: KnownModules,
    calls: list[tuple[CallGraph, int]],
    layer_users: Mapping[str, Users],
    doubts: Doubts,
) -> Feed:
    first = [(run, i) for run, i in calls if not run.calls[i].way] or calls
    kind = _kind(first)
    positions, dims = _extent(first)
    last = all(ends_branch(run, i) for run, i in first)
    sources = [(run, run.feeder(i)) for run, i in calls if not run.outside(i)]
    producers = tuple(dict.fromkeys(run.names[s] for run, s in sources if s is not None))
    reason = ""
    if _kind(calls) != kind:
        way = min(run.calls[i].way for run, i in calls if _kind([(run, i)]) != kind)
        reason = f"{way}, its input is another"
    elif kind not in ("conv", "conv_transpose", "linear"):
        reason = _why_no_layer(first, known) or f"its input is {_WORDS.get(kind, 'not the output of one layer')}"
    elif known.modules[path]._forward_pre_hooks:
        reason = "a forward pre-hook stands before it"
    else:
        for producer in producers:
            reason = reason or _why_not(producer, path, known, layer_users)
            reason = reason or _hooked_between(producer, path, known.modules)
        if any(map(doubts.about, (path, *producers))):
            reason = reason or IN_DOUBT
    vectors = known.facts[path].dims in (None, 1)
    direct = [run.calls[i].input_shape or (0, 0) for run, i in calls if run.feeder(i) == run.source(i)]
    if kind == "linear" and (not vectors or any(shape[2:] for shape in direct)):
        reason = reason or "a linear layer's channels are its last dimension, the norm's its second"
    foldable = not reason
    return Feed(kind, producers if foldable else (), foldable, reason, last, dims, positions)


def _kind(calls: list[tuple[CallGraph, int]]) -> str:
    """What the norm is fed by in all of these calls; those that do not show it count only where none does."""
    shown = [(run, run.feeder(i)) for run, i in calls if not run.outside(i)]
    kinds = {"other" if s is None else run.kinds[s] for run, s in shown} or {"input"}
    return kinds.pop() if len(kinds) == 1 else "other"


def _why_no_layer(calls: list[tuple[CallGraph, int]], known: KnownModules) -> str:
    """Why no layer is known to make the norm's input: it is a part of an output, or of somebody's own making."""
    for run, source in ((run, run.feeder(i)) for run, i in calls):
        if source is None:
            continue
        call, name = run.calls[source], run.names[source]
        if call.kind == "function" and name in ("getitem", "slice") and run.layer_kind(call.inputs[0]) is not None:
            return f"its input is a part of the output of {run.names[call.inputs[0]]}, maybe not with all channels"
        path = name if call.kind == "module" else known.first_name.get(call.by, "")
        layer = known.modules.get(path)
        if layer is not None and parametrize.is_parametrized(layer, "weight"):
            return f"the weight of {path} is computed, not a parameter"
        if layer is None or not call.by or not _weight_is_all(layer):
            continue
        cls, weight = type(layer).__name__, [run.calls[i].kind for i in call.inputs[1:2]]
        if name in _BY_WEIGHT and weight != ["parameter"]:
            return f"the weight of {path} is computed by its class, {cls}, not a parameter"
        return f"{path} is of a class of its own, {cls}, whose output is not known to scale with its weight"
    return ""


def _weight_is_all(module: nn.Module) -> bool:
    """Whether a module has a weight, and nothing below it has parameters."""
    below = (p for child in module.children() for p in child.parameters())
    return module._parameters.get("weight") is not None and not any(True for _ in below)


_BY_WEIGHT = {name for dims in "123" for name in (f"conv{dims}d", f"conv_transpose{dims}d")} | {"linear"}
"""Functions whose second argument is the weight."""
_WORDS = {
    "sum": "a sum",
    "concat": "a concatenation",
    "input": "the input of the network or of the part of it that traces",
    "norm": "the output of another norm",
}


def _why_not(producer: str, path: str, known: KnownModules, layer_users: Mapping[str, Users]) -> str:
    layer, facts = known.modules[producer], known.facts[producer]
    gain = gain_name(layer)
    sizes = {facts.dims, known.facts[path].dims} - {None}
    if len(sizes) > 1:
        return f"the norm reads the output of {producer} in other dimensions than it was made"
    if gain is None:
        return f"the weight of {producer} is computed, not a parameter"
    if known.owners[id(gain_of(layer))] > 1 or _parametrized_twice(producer, gain, known):
        return f"the weight of {producer} is shared with another layer"
    others = [(way, _read_of(user)) for user, way in layer_users[producer].items() if user != path]
    if others:
        way, what = min(others)
        return ", ".join([*filter(None, [way]), f"the {what} of {producer} is used elsewhere too"])
    if foreign_hooks(layer):
        return f"a hook on {producer} sees its output or input"
    if facts.channels != known.norms[path]:
        return f"{producer} has {facts.channels} output channels, the norm {known.norms[path]}"
    bias = layer._parameters.get("bias")
    if (bias is None and layer.bias is not None) or (bias is not None and known.owners[id(bias)] > 1):
        return f"the bias of {producer} is computed or shared"
    return ""


def _read_of(user: str | Elsewhere) -> str:
    return user.what if isinstance(user, Elsewhere) else "output"


def _parametrized_twice(producer: str, gain: str, known: KnownModules) -> bool:
    """Whether what computes a layer's weight computes another layer's too."""
    if gain == "weight" or PARAMETRIZED.strip(".") not in gain:
        return False
    holder = known.first_name[f"{producer}.{gain.rpartition('.')[0]}"]
    names = (name for name, first in known.first_name.items() if first == holder)
    return any(known.first_name[layer_of(name)] != producer for name in names)


def _hooked_between(producer: str, path: str, modules: Mapping[str, nn.Module]) -> str:
    """A hook on a module that holds the layer but not the norm, or the norm but not the layer, sees what is folded."""
    for held, other, table in ((producer, path, "_forward_hooks"), (path, producer, "_forward_pre_hooks")):
        parts = held.split(".")
        for ancestor in (".".join(parts[:n]) for n in range(1, len(parts))):
            holder = modules.get(ancestor)
            if holder is not None and not is_below(other, ancestor) and getattr(holder, table):
                return f"a hook on {ancestor} sees what lies between {producer} and the norm"
    return ""


def _extent(calls: list[tuple[CallGraph, int]]) -> tuple[int | None, int | None]:
    shapes = [run.calls[i].input_shape for run, i in calls]
    extents = [shape[2:] for shape in shapes if shape is not None]
    if extents:
        return min(_product(e) for e in extents), max(1, len(extents[0]))
    sources = [(run, run.feeder(i)) for run, i in calls]
    dims = {run.dims(s) if s is not None else None for run, s in sources}
    return None, dims.pop() if len(dims) == 1 else None


def _product(sizes: Iterable[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
