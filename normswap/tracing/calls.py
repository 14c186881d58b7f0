"""A run of a network as calls: what each is to the norm that it feeds, and what is known of its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..norms.registry import looks_batch
from .run import Region

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


class CallGraph:
    """One region with the lookups an analysis needs."""

    def __init__(self, region: Region, canonical: Mapping[str, str], modules: Mapping[str, nn.Module]) -> None:
        self.calls = region.calls
        self.part = region.path != ""
        self.modules = modules
        self.names = [canonical.get(c.target, c.target) if c.kind == "module" else c.target for c in self.calls]
        self.users: list[list[int]] = [[] for _ in self.calls]
        for index, call in enumerate(self.calls):
            for source in call.inputs:
                self.users[source].append(index)

    def source(self, index: int) -> int | None:
        """The call whose output a call reads first."""
        return self.calls[index].inputs[0] if self.calls[index].inputs else None

    def open(self, index: int) -> bool:
        """Whether what a call reads comes from outside of the part of the network that this run is of."""
        source = self.source(index)
        return self.part and source is not None and self.calls[source].kind == "input"

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
        return "sum" if name in SUMS else "concat" if name in _CONCATS else "other"

    def dims(self, index: int) -> int | None:
        """Spatial dimensions of a call's output, looking back to the next layer that fixes them."""
        for _ in range(64):
            call, module = self.calls[index], self.module(index)
            if call.shape is not None:
                return max(1, len(call.shape) - 2)
            if module is not None and (fixed := dims_of(module)) is not None:
                return fixed
            keeps = module is not None or (call.kind == "function" and self.names[index] in _ELEMENTWISE)
            if self.names[index] == "flatten" or isinstance(module, nn.Flatten):
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
