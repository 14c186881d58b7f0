"""Where the order of channels can be changed without changing what the network computes, and changing it.

Inside a block, a layer feeds a norm, elementwise activations and one more layer, and nothing else sees what lies
between. The channels there can stand in any order, if the layer's rows, gamma and beta, and the next layer's columns
stand in the same; depthwise convolutions on the way go along with their own norm. Along a residual stream, where many
layers read and write, they cannot. Doubt means: no.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain as joined
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..conversion.undo_record import Order, reorder
from ..modules.tree import aliases, module_at
from ..norms._wrappers import NormSequence
from ..planning.plan import Step
from ..tracing.calls import CallGraph, KnownModules, passes_on, plain_kind
from ..tracing.code_paths import other_settings
from ..tracing.recorded import record
from ..tracing.source_reading import doubtful_below, uses_of
from .moments import Args
from .norm_targets import Target

_ELEMENTWISE = {
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "silu", "sigmoid", "gelu", "elu", "selu", "celu",
    "leaky_relu", "hardswish", "hardsigmoid", "tanh", "softplus", "mish", "threshold", "exp", "mul", "add", "sub",
    "div", "pow", "detach", "clone", "alias", "_to_copy", "max_pool2d_with_indices", "max_pool2d", "avg_pool2d",
    "max_pool1d", "avg_pool3d", "max_pool3d_with_indices", "constant_pad_nd", "upsample_nearest2d",
    "upsample_bilinear2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "native_dropout",
}  # fmt: skip
_RESHAPING = {"view", "_unsafe_view", "reshape", "squeeze", "flatten"}
_PLAIN = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Identity, nn.Mish, nn.Tanh)


@dataclass(frozen=True)
class Chain:
    """Paths. layers: the one before the first norm, and depthwise ones after it; consumer: the one that mixes again."""

    norms: tuple[str, ...]
    layers: tuple[str, ...]
    consumer: str


def chains_of(model: nn.Module, args: Args, targets: Mapping[str, Target], steps: Mapping[str, Step]) -> list[Chain]:
    """Where the order of channels is free, by a run of the converted network on `args`.

    targets, steps: of the norms that may be in a chain.
    """
    paths = aliases(model)
    known = KnownModules(paths, {path: targets[path].state.channels for path in steps})
    try:
        region = record(model, args, known.watched)
    except Exception:  # whatever a stranger's forward raises; what cannot be watched keeps its order
        return []
    run = CallGraph(region, known)
    calls = Counter(run.names[i] for i, call in enumerate(run.calls) if call.kind == "module")
    read = {call.target.rpartition(".")[0] for call in run.calls if call.kind == "parameter"}
    owners = Counter(id(p) for module in paths for p in module._parameters.values() if p is not None)
    found: list[Chain] = []
    for i, name in enumerate(run.names):
        if run.calls[i].kind != "module" or name not in steps or any(name in chain.norms for chain in found):
            continue
        chain = _followed(run, i, steps, targets)
        if chain is not None and _sound(chain, known.modules, calls, read, owners):
            found.append(chain)
    return found


def _followed(run: CallGraph, start: int, steps: Mapping[str, Step], targets: Mapping[str, Target]) -> Chain | None:
    """The chain that begins with a call of a norm; None where its channels go anywhere that is not known."""
    first = run.names[start]
    layers, norms, consumer = list(steps[first].producers), [first], ""
    channels, groups = targets[first].state.channels, targets[first].state.num_groups
    if len(layers) != 1 or not _has_rows(run.modules[layers[0]]) or _has_parameters(run, start):
        return None
    values = {start}
    for i in range(start + 1, len(run.calls)):
        call, module, name = run.calls[i], run.module(i), run.names[i]
        if values.isdisjoint(call.inputs):
            continue
        if not values.issuperset(call.inputs) or call.kind not in ("module", "function"):
            return None
        if module is None:
            if not _keeps_channels(run, i, channels):
                return None
        elif name in steps:
            state = targets[name].state
            if steps[name].producers != (layers[-1],) or state.num_groups != groups or _has_parameters(run, i):
                return None
            norms.append(name)
        elif (kind := plain_kind(module)) in ("conv", "linear"):
            if _mixes(module, channels) and (kind == "conv" or _are_vectors(run, call.inputs)):
                if consumer:
                    return None
                consumer = name
                continue  # its output is its own
            if kind == "linear" or not _depthwise(module, channels):
                return None
            layers.append(name)
        elif not (_passes(module) and _keeps_shape(run, i, channels)):
            return None
        values.add(i)
    return Chain(tuple(norms), tuple(layers), consumer) if consumer else None


def _has_rows(layer: nn.Module) -> bool:
    """Whether each row of a layer's weight makes one channel, from all of its input; a transposed one's columns do."""
    return getattr(layer, "groups", 1) == 1 and not isinstance(layer, _ConvTransposeNd)


def _has_parameters(run: CallGraph, index: int) -> bool:
    """Whether activations that are fused into a norm may treat channels differently."""
    module = run.module(index)
    if not isinstance(module, NormSequence):
        return False
    rest = [child for name, child in module._modules.items() if name != "norm"]
    return not all(isinstance(child, _PLAIN) or _passes(child) for child in rest if child is not None)


def _mixes(layer: Any, channels: int) -> bool:
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return bool(inputs == channels and getattr(layer, "groups", 1) == 1)


def _are_vectors(run: CallGraph, inputs: tuple[int, ...]) -> bool:
    """Whether a linear layer is given `(N, C)`: of more dimensions it mixes the last, which is as long by chance."""
    return all(len(run.calls[source].shape or ()) == 2 for source in inputs)


def _depthwise(layer: Any, channels: int) -> bool:
    return bool(layer.groups == layer.in_channels == layer.out_channels == channels)


def _passes(module: nn.Module | None) -> bool:
    pools = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    return module is not None and (isinstance(module, pools) or passes_on(module))


def _keeps_channels(run: CallGraph, i: int, channels: int) -> bool:
    """Whether a function maps each channel, all in the same way, to the same place of its output."""
    call = run.calls[i]
    name = run.names[i].removesuffix("_")
    shapes = [run.calls[source].shape for source in call.inputs]
    given, out = shapes[0], call.shape
    if given is None or out is None or not _keeps_shape(run, i, channels):
        return False
    if name in _ELEMENTWISE:
        return all(shape is not None and len(shape) == len(out) for shape in shapes)
    single = set(given[2:]) <= {1} and set(out[2:]) <= {1}
    if name in _RESHAPING:
        return single and len(given) >= 2
    # A mean over all positions; the shapes tell which dimensions only where no two are alike.
    return name == "mean" and set(out[2:]) <= {1} and not {given[0], given[1]} & set(given[2:])


def _keeps_shape(run: CallGraph, i: int, channels: int) -> bool:
    given, out = run.calls[run.calls[i].inputs[0]].shape, run.calls[i].shape
    return given is not None and out is not None and given[:2] == out[:2] and out[1:2] == (channels,)


def _sound(
    chain: Chain, modules: Mapping[str, nn.Module], calls: Mapping[str, int], read: set[str], owners: Mapping[int, int]
) -> bool:
    """Whether each module runs once, owns its tensors, and nothing else gets at what is between them."""
    parts = (*chain.norms, *chain.layers, chain.consumer)
    for path in parts:
        module = modules[path]
        if calls[path] != 1 or any(p == path or p.startswith(f"{path}.") for p in read):
            return False
        if path not in chain.norms and not isinstance(module._parameters.get("weight"), nn.Parameter):
            return False
        if any(owners[id(p)] > 1 for p in module.parameters()):
            return False
    common = _common(parts)
    inside = [m for path, m in modules.items() if common == "" or path.startswith(f"{common}.")]
    if any(m._forward_hooks or m._forward_pre_hooks for m in inside if m is not modules[common]):
        return False
    return not any(_opened(ancestor, part, common, modules) for part in parts for ancestor in _ancestors(part))


def _opened(path: str, part: str, common: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the code of a module around a part may, by a flag such as `training`, use it otherwise than here."""
    module = modules.get(path)
    if module is None or type(module).__module__.startswith("torch.nn.") or next(other_settings(module), None) is None:
        return False
    if len(path) >= len(common):
        return True
    child = part[len(path) :].lstrip(".").split(".")[0]
    return bool(doubtful_below(module, uses_of(module), child, lambda m: True))


def _common(paths: tuple[str, ...]) -> str:
    """The path of the innermost module that holds them all."""
    split = [path.split(".")[:-1] for path in paths]
    shared = 0
    while all(len(s) > shared and s[shared] == split[0][shared] for s in split):
        shared += 1
    return ".".join(split[0][:shared])


def _ancestors(path: str) -> Iterator[str]:
    names = path.split(".")
    return (".".join(names[:n]) for n in range(len(names)))


def orders_of(chains: Mapping[Chain, Tensor]) -> list[Order]:
    """How each module's channels are to stand: rows of its output, columns of its input."""
    places: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for chain, order in chains.items():
        for path in joined(chain.norms, chain.layers):
            places[path]["rows"] = order
        places[chain.consumer]["columns"] = order
    return [Order(path, **sides) for path, sides in places.items()]


@torch.no_grad()
def permute(model: nn.Module, orders: list[Order], *, back: bool = False) -> None:
    """Put the channels of modules in these orders, or back, in place."""
    for order in orders:
        reorder(module_at(model, order.path), order, back=back)
