"""A run of a network as calls: what each is to the norm that it feeds, and what is known of its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..modules.storage import sharers
from ..norms.batch import insists_on_one_dim
from ..norms.registry import inner_of, looks_batch
from .own_convolution import is_convolution
from .run import Region, join

# Convolutions of other libraries whose forward differs from torch's only in how it pads its input.
_CONV_CLASS_NAMES = {
    "timm.layers.conv2d_same.Conv2dSame",
    "timm.layers.conv2d_same.Conv2dSameExport",
    "timm.layers.padding.Conv2dSame",
}
SUMS = {"add", "add_", "iadd", "__iadd__", "sub", "sum"}
_CONCATS = {"cat", "concat", "concatenate", "stack"}
_ELEMENTWISE = {
    *SUMS, "relu", "relu_", "hardtanh", "hardtanh_", "clamp", "silu", "silu_", "sigmoid", "gelu", "leaky_relu",
    "leaky_relu_", "mul", "mul_", "imul", "hardswish", "hardswish_", "dropout", "contiguous", "clone", "detach",
    "upsample_bilinear2d", "upsample_nearest2d", "interpolate", "max_pool2d", "avg_pool2d", "cat", "concat", "pad",
}  # fmt: skip


def producer_kind(module: nn.Module) -> str | None:
    """`conv`, `conv_transpose` or `linear` for a layer linear in its `weight`, output channel by output channel."""
    kind = plain_kind(module)
    if kind is None and isinstance(module, _ConvNd) and "forward" not in module.__dict__ and is_convolution(module):
        return "conv_transpose" if isinstance(module, _ConvTransposeNd) else "conv"
    return kind


def plain_kind(module: nn.Module) -> str | None:
    """`producer_kind` of a layer that reads its input as torch's own do, channel by channel too."""
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


@dataclass(frozen=True)
class LayerFacts:
    """What counts of one module: see `producer_kind`, `out_channels` (0 where none) and `dims_of`."""

    kind: str | None
    channels: int
    dims: int | None


class KnownModules:
    """The modules of a network as an analysis of its calls needs them, by their first names.

    paths: what `aliases` returned. norms: path -> channels. owners: by a parameter's id, how many modules hold it, or
    what overlaps with it. watched: what a recorded run takes whole: norms, layers that can be folded, and dropouts.
    """

    def __init__(self, paths: Mapping[nn.Module, list[str]], norms: Mapping[str, int]) -> None:
        self.norms = norms
        self.first_name = {alias: names[0] for names in paths.values() for alias in names}
        # A call of what only hands on to a norm is a call of that norm.
        handing = {module: inner for module in paths if (inner := inner_of(module)) is not None}
        for module, inner in handing.items():
            self.first_name |= {alias: self.first_name[join(alias, inner)] for alias in paths[module]}
        self.modules = {names[0]: module for module, names in paths.items()}
        self.facts = {name: _facts_of(module) for name, module in self.modules.items()}
        self.owners = sharers(p for module in paths for p in module._parameters.values() if p is not None)
        self.watched = {
            module: name
            for name, module in self.modules.items()
            if name in norms or self.facts[name].kind is not None or passes_on(module)
            # What is called Identity is gone into: it may stand between a layer and its norm if it is one.
            if type(module).__name__ != "Identity"
        }
        self.watched |= {module: self.first_name[paths[module][0]] for module in handing}


def _facts_of(module: nn.Module) -> LayerFacts:
    kind = producer_kind(module)
    return LayerFacts(kind, 0 if kind is None else out_channels(module), dims_of(module))


PASSTHROUGH_CLASSES = {"Identity", "DropPath", "StochasticDepth", "DropBlock2d", "DropBlock2D", "DropBlock3d"}


def passes_on(module: nn.Module) -> bool:
    """Whether a module gives back what it is given, but for what is dropped in training."""
    return isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ in PASSTHROUGH_CLASSES


class CallGraph:
    """One region with the lookups an analysis needs.

    kinds: what each call is, seen by the norm that it feeds. norms: the path of the norm that it is a call of; None
    for any other.
    """

    def __init__(self, region: Region, known: KnownModules) -> None:
        self.calls = region.calls
        self.part = region.path != ""
        self.modules, self.facts = known.modules, known.facts
        self.names = [known.first_name.get(c.target, c.target) if c.kind == "module" else c.target for c in self.calls]
        named = list(zip(self.calls, self.names, strict=True))
        self.norms = [name if call.kind == "module" and name in known.norms else None for call, name in named]
        self.kinds = [self._kind(index) for index in range(len(self.calls))]
        self.users: list[list[int]] = [[] for _ in self.calls]
        for index, call in enumerate(self.calls):
            for source in call.inputs:
                self.users[source].append(index)

    def source(self, index: int) -> int | None:
        """The call whose output a call reads first."""
        return self.calls[index].inputs[0] if self.calls[index].inputs else None

    def feeder(self, index: int) -> int | None:
        """What a call of a norm reads, seen through what is not in the way of a fold.

        The linear layer, if but its channels are moved to where the norm has them; the convolution, if but positions
        are cut away.
        """
        source = self.source(index)
        if source is None:
            return None
        if self._moved(source, index):
            return self.calls[source].inputs[0]
        layer = self._cut_from(source)
        return source if layer is None else layer

    def readers(self, index: int) -> list[int]:
        """Who reads a call's output, among them the norms that `feeder` finds to read it."""
        return [reader for user in self.users[index] for reader in self._beyond(user)]

    def _beyond(self, user: int) -> list[int]:
        found = self.users[user]
        if self._cut_from(user) is not None:
            return [reader for each in found for reader in self._beyond(each)] or [user]
        return found if found and all(self._moved(user, reader) for reader in found) else [user]

    def _cut_from(self, index: int) -> int | None:
        """The call of the convolution of whose output a call cuts positions away, or one after another; else None."""
        needed, source = 0, index
        while self.calls[source].cuts and self.calls[source].inputs:
            needed, source = max(needed, self.calls[source].cuts), self.calls[source].inputs[0]
        layer: Any = self.module(source)
        if not needed or self.layer_kind(source) not in ("conv", "conv_transpose"):
            return None
        return source if needed <= len(layer.kernel_size) else None

    def _moved(self, index: int, norm: int) -> bool:
        """Whether a call moves all channels of a linear layer, no more and no less, for a call of a norm.

        That both have as many is asked for elsewhere.
        """
        call, path = self.calls[index], self.norms[norm]
        if not call.moves or not call.inputs or path is None or not insists_on_one_dim(self.modules[path]):
            return False
        return self.layer_kind(call.inputs[0]) == "linear"

    def outside(self, index: int) -> bool:
        """Whether what a call reads comes from outside of the part of the network that this run is of."""
        source = self.source(index)
        return self.part and source is not None and self.calls[source].kind == "input"

    def module(self, index: int) -> nn.Module | None:
        return self.modules.get(self.names[index]) if self.calls[index].kind == "module" else None

    def layer_kind(self, index: int) -> str | None:
        """`producer_kind` of the module that a call is a call of."""
        facts = self.facts.get(self.names[index]) if self.calls[index].kind == "module" else None
        return None if facts is None else facts.kind

    def _kind(self, index: int) -> str:
        call, name = self.calls[index], self.names[index]
        if call.kind == "module":
            return "norm" if self.norms[index] is not None else self.layer_kind(index) or "other"
        if call.kind == "input":
            return "input"
        return "sum" if name in SUMS else "concat" if name in _CONCATS else "other"

    def dims(self, index: int) -> int | None:
        """Spatial dimensions of a call's output, looking back to the next layer that fixes them."""
        for _ in range(64):
            call, name, module = self.calls[index], self.names[index], self.module(index)
            if call.shape is not None:
                return max(1, len(call.shape) - 2)
            if module is not None and (fixed := self.facts[name].dims) is not None:
                return fixed
            keeps = module is not None or (call.kind == "function" and name in _ELEMENTWISE)
            if name == "flatten" or isinstance(module, nn.Flatten):
                return 1
            if not keeps or not call.inputs:
                return None
            index = call.inputs[0]
        return None


def dims_of(module: nn.Module) -> int | None:
    """Spatial dimensions of a layer's output, where its class tells."""
    if isinstance(module, (nn.Linear, nn.Flatten)):
        return 1
    name = type(module).__name__
    if isinstance(module, _ConvNd) or "Pool" in name or looks_batch(module):
        return next((d for d in (1, 2, 3) if f"{d}d" in name.lower()), None)
    return None
