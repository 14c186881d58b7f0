"""Conclusions from the runs of `graph.py`: what feeds each norm, and whether its statistics can be folded into it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .graph import Region, is_below

# Convolutions of other libraries whose forward differs from torch's only in how it pads its input.
_CONV_CLASS_NAMES = {
    "timm.layers.conv2d_same.Conv2dSame",
    "timm.layers.conv2d_same.Conv2dSameExport",
    "timm.layers.padding.Conv2dSame",
}
_SUMS = {"add", "add_", "iadd", "__iadd__", "sub", "sum"}
_CONCATS = {"cat", "concat", "concatenate", "stack"}
_ELEMENTWISE = {
    *_SUMS, "relu", "relu_", "hardtanh", "hardtanh_", "clamp", "silu", "silu_", "sigmoid", "gelu", "leaky_relu",
    "leaky_relu_", "mul", "mul_", "imul", "hardswish", "hardswish_", "dropout", "contiguous", "clone", "detach",
    "upsample_bilinear2d", "upsample_nearest2d", "interpolate", "max_pool2d", "avg_pool2d", "cat", "concat", "pad",
}  # fmt: skip
_PASSTHROUGH_CLASSES = {"Identity", "DropPath", "StochasticDepth", "DropBlock2d", "DropBlock2D", "DropBlock3d"}
_PASSTHROUGH_FUNCTIONS = {"dropout", "stochastic_depth", "mul", "mul_", "detach", "clone", "alias"}


@dataclass(frozen=True)
class Feed:
    """What one norm's input is.

    kind: `conv`, `conv_transpose`, `linear`, `sum`, `concat`, `input`, `norm`, `other`, or `unknown` (no run showed
    it). producers: paths of the layers the statistics can be folded into, empty unless `foldable`. reason: why it
    is not foldable. last_of_branch: it is the last norm of a residual branch. dims: spatial dimensions of the input;
    positions: their product where known (1 for a pooled map or a vector).
    """

    kind: str
    producers: tuple[str, ...] = ()
    foldable: bool = False
    reason: str = ""
    last_of_branch: bool = False
    dims: int | None = None
    positions: int | None = None


UNKNOWN = Feed("unknown", reason="no run of the network showed what feeds it")


def producer_kind(module: nn.Module) -> str | None:
    """`conv`, `conv_transpose` or `linear` for a layer linear in its `weight`, output channel by output channel."""
    cls: Any = type(module)
    if "forward" in module.__dict__:
        return None
    if isinstance(module, _ConvNd):
        standard = any(cls.forward is c.forward and cls._conv_forward is c._conv_forward for c in _CONVS)
        if standard or f"{cls.__module__}.{cls.__qualname__}" in _CONV_CLASS_NAMES:
            return "conv"
        if any(cls.forward is c.forward for c in _TRANSPOSED) and isinstance(module, _ConvTransposeNd):
            return "conv_transpose"
    elif isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward:
        return "linear"
    return None


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def out_channels(module: Any) -> int:
    """Output channels of a layer that `producer_kind` knows."""
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)


class _Run:
    """One region with the lookups an analysis needs."""

    def __init__(self, region: Region, canonical: Mapping[str, str], modules: Mapping[str, nn.Module]) -> None:
        self.calls = region.calls
        self.modules = modules
        self.names = [canonical.get(c.target, c.target) if c.kind == "module" else c.target for c in self.calls]
        self.users: list[list[int]] = [[] for _ in self.calls]
        for index, call in enumerate(self.calls):
            for source in call.inputs:
                self.users[source].append(index)

    def module(self, index: int) -> nn.Module | None:
        return self.modules.get(self.names[index]) if self.calls[index].kind == "module" else None

    def norm(self, index: int, norms: Mapping[str, int]) -> str | None:
        """The path of the norm that a call is a call of; None for any other."""
        name = self.names[index]
        return name if self.calls[index].kind == "module" and name in norms else None

    def kind(self, index: int, norms: Mapping[str, int]) -> str:
        """What a call is, seen by the norm that it feeds."""
        call, name = self.calls[index], self.names[index]
        if call.kind == "module":
            if name in norms:
                return "norm"
            module = self.module(index)
            return (producer_kind(module) if module is not None else None) or "other"
        if call.kind == "input":
            return "input"
        return "sum" if name in _SUMS else "concat" if name in _CONCATS else "other"

    def dims(self, index: int) -> int | None:
        """Spatial dimensions of a call's output, looking back to the next layer that fixes them."""
        for _ in range(64):
            call, module = self.calls[index], self.module(index)
            if call.shape is not None:
                return max(1, len(call.shape) - 2)
            if module is not None and (fixed := _dims_of(module)) is not None:
                return fixed
            keeps = module is not None or (call.kind == "function" and self.names[index] in _ELEMENTWISE)
            if self.names[index] == "flatten" or isinstance(module, nn.Flatten):
                return 1
            if not keeps or not call.inputs:
                return None
            index = call.inputs[0]
        return None

    def pooled(self, index: int) -> bool:
        """Whether a call's output is known to be a single position: a global pool, then layers that keep its size."""
        for _ in range(16):
            call, module = self.calls[index], self.module(index)
            if isinstance(module, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)):
                size = module.output_size
                return all(s == 1 for s in (size if isinstance(size, tuple) else (size,)))
            if isinstance(module, _ConvNd) and (set(module.kernel_size) != {1} or any(p for p in module.padding)):
                return False
            if module is None or not call.inputs or isinstance(module, (nn.Upsample, nn.Unflatten)):
                return False
            index = call.inputs[0]
        return False


def _dims_of(module: nn.Module) -> int | None:
    if isinstance(module, (nn.Linear, nn.Flatten)):
        return 1
    name = type(module).__name__
    if (
        isinstance(module, _ConvNd)
        or "Pool" in name
        or name.startswith(("BatchNorm", "InstanceNorm", "FrozenBatchNorm"))
    ):
        return next((d for d in (1, 2, 3) if f"{d}d" in name.lower()), None)
    return None


def analyse(
    paths: Mapping[nn.Module, list[str]],
    regions: Iterable[Region],
    norms: Mapping[str, int],
    doubtful: Iterable[str] = (),
) -> dict[str, Feed]:
    """What feeds each norm. `paths`: every module with its aliases; `norms`: path -> channels.

    Every call of a norm and of the layer before it counts, in every region: one use elsewhere, and it is not
    foldable.
    """
    canonical = {alias: names[0] for names in paths.values() for alias in names}
    modules = {names[0]: module for module, names in paths.items()}
    owners = _owners(paths)
    runs = [_Run(region, canonical, modules) for region in regions]
    norm_calls: dict[str, list[tuple[_Run, int]]] = defaultdict(list)
    layer_users: dict[str, set[str | None]] = defaultdict(set)
    for run in runs:
        for index, name in enumerate(run.names):
            kind = run.calls[index].kind
            if run.norm(index, norms) is not None:
                norm_calls[name].append((run, index))
            elif kind == "module":
                users = {run.norm(u, norms) for u in run.users[index]}
                layer_users[name] |= users or {None}
            elif kind == "parameter":
                layer_users[canonical.get(name.rpartition(".")[0], "")].add(None)
    doubts = tuple(canonical.get(d, d) for d in doubtful)
    return {
        path: _feed_of(path, norms, norm_calls[path], layer_users, modules, owners, doubts)
        if norm_calls[path]
        else UNKNOWN
        for path in norms
    }


def _owners(paths: Mapping[nn.Module, list[str]]) -> dict[int, int]:
    """How many modules own each parameter."""
    owners: dict[int, int] = defaultdict(int)
    for module in paths:
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] += 1
    return owners


def _feed_of(
    path: str,
    norms: Mapping[str, int],
    calls: list[tuple[_Run, int]],
    layer_users: Mapping[str, set[str | None]],
    modules: Mapping[str, nn.Module],
    owners: Mapping[int, int],
    doubts: tuple[str, ...],
) -> Feed:
    sources = [(run, run.calls[i].inputs[0] if run.calls[i].inputs else None) for run, i in calls]
    kinds = {"other" if s is None else run.kind(s, norms) for run, s in sources}
    kind = kinds.pop() if len(kinds) == 1 else "other"
    positions, dims = _extent(calls, sources, kind)
    last = all(_ends_branch(run, i) for run, i in calls)
    producers = tuple(dict.fromkeys(run.names[s] for run, s in sources if s is not None))
    reason = ""
    if kind not in ("conv", "conv_transpose", "linear"):
        reason = f"its input is {_WORDS.get(kind, 'not the output of one layer')}"
    elif modules[path]._forward_pre_hooks:
        reason = "a forward pre-hook stands before it"
    else:
        for producer in producers:
            reason = reason or _why_not(producer, path, norms[path], layer_users, modules, owners)
            reason = reason or _hooked_between(producer, path, modules)
        if any(is_below(p, d) for p in (path, *producers) for d in doubts):
            reason = reason or "its owner's forward does not trace, and may use the layer elsewhere"
    vectors = _dims_of(modules[path]) in (None, 1)
    if kind == "linear" and (not vectors or any((run.calls[i].input_shape or (0, 0))[2:] for run, i in calls)):
        reason = reason or "a linear layer's channels are its last dimension, the norm's its second"
    foldable = not reason
    return Feed(kind, producers if foldable else (), foldable, reason, last, dims, positions)


_WORDS = {
    "sum": "a sum",
    "concat": "a concatenation",
    "input": "the input of the network or of the part of it that traces",
    "norm": "the output of another norm",
}


def _why_not(
    producer: str,
    path: str,
    channels: int,
    layer_users: Mapping[str, set[str | None]],
    modules: Mapping[str, nn.Module],
    owners: Mapping[int, int],
) -> str:
    layer = modules[producer]
    weight = layer._parameters.get("weight")
    sizes = {_dims_of(layer), _dims_of(modules[path])} - {None}
    if len(sizes) > 1:
        return f"the norm reads the output of {producer} in other dimensions than it was made"
    if weight is None:
        return f"the weight of {producer} is computed, not a parameter"
    if owners[id(weight)] > 1:
        return f"the weight of {producer} is shared with another layer"
    if layer_users[producer] != {path}:
        return f"the output of {producer} is used elsewhere too"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return f"a hook on {producer} sees its output or input"
    if out_channels(layer) != channels:
        return f"{producer} has {out_channels(layer)} output channels, the norm {channels}"
    bias = layer._parameters.get("bias")
    if (bias is None and layer.bias is not None) or (bias is not None and owners[id(bias)] > 1):
        return f"the bias of {producer} is computed or shared"
    return ""


def _hooked_between(producer: str, path: str, modules: Mapping[str, nn.Module]) -> str:
    """A hook on a module that holds the layer but not the norm, or the norm but not the layer, sees what is folded."""
    for held, other, table in ((producer, path, "_forward_hooks"), (path, producer, "_forward_pre_hooks")):
        parts = held.split(".")
        for ancestor in (".".join(parts[:n]) for n in range(1, len(parts))):
            holder = modules.get(ancestor)
            if holder is not None and not is_below(other, ancestor) and getattr(holder, table):
                return f"a hook on {ancestor} sees what lies between {producer} and the norm"
    return ""


def _extent(
    calls: list[tuple[_Run, int]], sources: list[tuple[_Run, int | None]], kind: str
) -> tuple[int | None, int | None]:
    shapes = [run.calls[i].input_shape for run, i in calls]
    if all(shape is not None for shape in shapes):
        extents = [shape[2:] for shape in shapes if shape is not None]
        return min(_product(e) for e in extents), max(1, len(extents[0]))
    if any(s is not None and (kind == "linear" or run.pooled(s)) for run, s in sources):
        dims = {run.dims(s) for run, s in sources if s is not None}
        return 1, dims.pop() if len(dims) == 1 else None
    dims = {run.dims(s) if s is not None else None for run, s in sources}
    return None, dims.pop() if len(dims) == 1 else None


def _product(sizes: Iterable[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _ends_branch(run: _Run, index: int) -> bool:
    """Whether a norm's output goes straight into a sum whose other side is the branch's own starting point.

    The starting point is an ancestor of the norm, itself or through at most one projection (a pool, a convolution, a
    norm): the projection shortcut ends in a norm too, but what it joins is deeper than itself.
    """
    while True:
        users = run.users[index]
        if len(users) != 1:
            return False
        user = users[0]
        if run.calls[user].kind == "function" and run.names[user] in _SUMS:
            break
        module = run.module(user)
        dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        by_class = module is not None and (dropout or type(module).__name__ in _PASSTHROUGH_CLASSES)
        if not (by_class or (run.calls[user].kind == "function" and run.names[user] in _PASSTHROUGH_FUNCTIONS)):
            return False
        index = user
    others = [source for source in run.calls[user].inputs if source != index]
    return len(others) == 1 and _is_shortcut(run, others[0], index)


def _is_shortcut(run: _Run, other: int, branch: int) -> bool:
    depth = _layers_between(run, other, branch)
    if depth is not None:
        return depth > 0
    start, layers = other, 0
    for _ in range(8):
        module, sources = run.module(start), set(run.calls[start].inputs)
        if len(sources) != 1:
            break
        layers += module is not None and producer_kind(module) is not None
        start = sources.pop()
        depth = _layers_between(run, start, branch)
        if depth is not None:
            return depth > layers
    return False


def _layers_between(run: _Run, start: int, end: int) -> int | None:
    """Most convolutions or linear layers on a way from call `start` to call `end`; None if there is no way."""
    best: dict[int, int | None] = {start: 0}

    for index in range(start + 1, end + 1):
        ways = [best.get(source) for source in run.calls[index].inputs]
        known = [w for w in ways if w is not None]
        module = run.module(index)
        step = int(module is not None and producer_kind(module) is not None)
        best[index] = max(known) + step if known else None
    return best.get(end)


def watched_modules(paths: Mapping[nn.Module, list[str]], norms: Iterable[str]) -> dict[nn.Module, str]:
    """The modules a recorded run takes whole: the norms, the layers that can be folded, and dropouts."""
    names = set(norms)
    return {
        module: aliases_[0]
        for module, aliases_ in paths.items()
        if aliases_[0] in names
        or producer_kind(module) is not None
        or isinstance(module, nn.modules.dropout._DropoutNd)
        or type(module).__name__ in _PASSTHROUGH_CLASSES
        or isinstance(module, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d))
    }
