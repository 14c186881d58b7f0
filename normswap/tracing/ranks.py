"""How many dimensions a tensor has whatever the network is given, where its code fixes that.

`x.reshape(-1, n)` has two of any x, and what works value by value leaves them as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..modules.gains import foreign_hooks
from .calls import CallGraph, KnownModules, passes_on
from .run import Region, is_below

# Leave the number of dimensions as it is, or that of the input which has most.
_KEEPING = {
    "relu", "relu_", "relu6", "tanh", "tanh_", "sigmoid", "sigmoid_", "gelu", "silu", "elu", "selu", "celu", "mish",
    "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "softplus", "dropout", "contiguous", "clone", "detach",
    "float", "add", "iadd", "add_", "sub", "isub", "mul", "imul", "mul_", "truediv", "cat", "concat", "neg", "clamp",
}  # fmt: skip
_SETTING = {"unsqueeze_", "squeeze_", "resize_", "resize_as_", "set_"}
"""Give a tensor other dimensions where it is, which what was said of it before does not know."""


def rank_given(node: fx.Node) -> int | None:
    """The dimensions of a symbolic run's value, where the call itself says how many; None anywhere else."""
    method, function = node.op == "call_method", node.op == "call_function"
    if (method and node.target in ("view", "reshape")) or (function and node.target is torch.reshape):
        sizes: Sequence[Any] = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = sizes[0]
        one = len(sizes) == 1 and not isinstance(sizes[0], int)  # which may be a whole shape, or a dtype
        return None if node.kwargs or one else len(sizes) or None
    if (method and node.target == "flatten") or (function and node.target is torch.flatten):
        start, end = (*node.args[1:], *(None, None))[:2]
        start = node.kwargs.get("start_dim", 0) if start is None else start
        return _flattened(start, node.kwargs.get("end_dim", -1) if end is None else end)
    return None


def _flattened(start: Any, end: Any) -> int | None:
    """The dimensions of what is flattened from one of them to the last; None where it is not to the last."""
    return start + 1 if isinstance(start, int) and start >= 0 and end == -1 else None


def vectors_by_code(known: KnownModules, regions: Iterable[Region], doubtful: Collection[str]) -> set[str]:
    """Paths of the norms whose input has two dimensions in every call, or channels that were moved to the second,
    whatever the network is given.

    regions: symbolic runs, which show how the code makes it. They do not show what hooks make of it: with any hook, or
    with what changes a tensor's dimensions in place, nothing is said. doubtful: paths of what may get other values too.
    """
    regions = list(regions)
    hooked = any(map(foreign_hooks, known.modules.values()))
    if hooked or any(
        call.kind == "function" and call.target in _SETTING for region in regions for call in region.calls
    ):
        return set()
    found: dict[str, set[int | None]] = defaultdict(set)
    for region in regions:
        run = CallGraph(region, known)
        ranks = ranks_of(run, region.alike)
        for i, path in enumerate(run.norms):
            if path is not None:
                source = run.source(i)
                moved = source is not None and run.calls[source].moves and run.feeder(i) != source
                found[path].add(2 if moved else None if source is None else ranks[source])
    unsure = {first for alias, first in known.first_name.items() if any(is_below(alias, d) for d in doubtful)}
    return {path for path, ranks in found.items() if ranks == {2}} - unsure


def ranks_of(run: CallGraph, alike: Iterable[list[int | None]]) -> list[int | None]:
    """How many dimensions the output of each call has whatever the network is given; None where that is not fixed.

    alike: see `Region`. What stands for other values must have their dimensions, or nothing holds of what came of it.
    """
    unsure: set[int] = set()
    while True:
        ranks: list[int | None] = []
        for i, call in enumerate(run.calls):
            found = _kept(run, i, [ranks[source] for source in call.inputs]) if call.rank is None else call.rank
            ranks.append(None if i in unsure else found)
        several = [calls for calls in alike if len({None if i is None else ranks[i] for i in calls}) > 1]
        more = {i for calls in several for i in calls if i is not None and ranks[i] is not None}
        if not more:
            return ranks
        unsure |= more


def _kept(run: CallGraph, index: int, given: Sequence[int | None]) -> int | None:
    """The dimensions of a call's output, from those of its inputs."""
    module = run.module(index)
    if type(module) is nn.Flatten:
        return _flattened(module.start_dim, module.end_dim)
    if module is None:
        keeps = run.calls[index].kind == "function" and run.names[index] in _KEEPING
    else:
        activation = (
            type(module).__module__ == "torch.nn.modules.activation" and type(module) is not nn.MultiheadAttention
        )
        layer = run.norms[index] is not None or run.layer_kind(index) == "linear"
        keeps = layer or activation or passes_on(module)
    known = [rank for rank in given if rank is not None]
    return max(known) if keeps and known and len(known) == len(given) else None
