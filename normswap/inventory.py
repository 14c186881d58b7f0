"""Find every norm layer of a network, what feeds it, and everything that looks like a norm but is not known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from . import norms as _norms  # noqa: F401  (registers the norm types)
from .calls import producer_kind
from .errors import DataError, first_line
from .feeds import UNKNOWN, Feed, analyse, watched_modules
from .graph import Region, record, trace
from .registry import class_of, identify, why_suspicious
from .roles import roles_of
from .spec import NormSpec, NormState
from .surgery import aliases, check_module, hidden_references
from .suspects import IN_CODE, Suspect, functional_batch_norm, suspicion
from .uses import branches_on_training


@dataclass(frozen=True)
class Layer:
    """One norm layer. `path` is its first name, `aliases` the others; `state` aliases the module's tensors.

    held_by: attributes that hold it beside the tables of children, as `PATH.ATTRIBUTE`; a swap cannot reach them.
    role: the part of the network it is in: `backbone`, `fpn` or `head`. free_gamma: whether it has a gamma that is no
    other layer's and not computed from something else.
    """

    path: str
    aliases: tuple[str, ...]
    spec: NormSpec
    class_name: str
    state: NormState
    feed: Feed
    held_by: tuple[str, ...] = ()
    role: str = "backbone"
    free_gamma: bool = False

    @property
    def mode(self) -> str:
        """`frozen` if nothing in it can move; else `train` or `eval`."""
        tensors = (self.state.weight, self.state.bias)
        fixed = not any(t is not None and t.requires_grad for t in tensors)
        if self.spec.name == "frozen" or (fixed and self.state.affine and not self.state.training):
            return "frozen"
        return "train" if self.state.training else "eval"

    def to_dict(self) -> dict[str, Any]:
        """JSON values: everything but the tensors."""
        state = self.state
        return {
            "path": self.path,
            "aliases": list(self.aliases),
            "role": self.role,
            "norm": self.spec.name,
            "class": self.class_name,
            "channels": state.channels,
            "num_groups": state.num_groups,
            "eps": state.eps,
            "affine": state.affine,
            "running_statistics": state.has_statistics,
            "mode": self.mode,
            "fused_with": list(state.tail),
            "feed": asdict(self.feed),
        }


@dataclass(frozen=True)
class Inventory:
    """Every norm layer in traversal order, and every suspect. recorded: a run on example inputs was watched."""

    layers: tuple[Layer, ...]
    suspects: tuple[Suspect, ...]
    recorded: bool = False

    def __getitem__(self, path: str) -> Layer:
        for layer in self.layers:
            if path == layer.path or path in layer.aliases:
                return layer
        raise KeyError(path)

    def __str__(self) -> str:
        rows = [
            f"{x.path or '(root)'}  {x.class_name}({x.state.channels})  eps={x.state.eps:g}  {x.mode}  "
            f"fed by {x.feed.kind}{' (foldable)' * x.feed.foldable}"
            for x in self.layers
        ]
        rows += [f"{s.path or '(root)'}  {s.class_name}: {s.reason}" for s in self.suspects]
        return "\n".join(rows) or "no norm layer"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"layers": [x.to_dict() for x in self.layers], "suspects": [asdict(s) for s in self.suspects]}


def inspect(model: nn.Module, example_inputs: Any = None, *, feeds: bool = True) -> Inventory:
    """List every norm layer of `model` and what feeds it. Changes nothing.

    example_inputs: a tensor, or a tuple of the forward's arguments; the network is then run once on them, in eval
    mode without gradients, and what that run shows decides. Without them it is traced symbolically.
    feeds=False skips either run; every feed is then unknown.

    Raises DataError when the network cannot be run on the example inputs.
    """
    check_module(model)
    paths = aliases(model)
    roles = roles_of(names[0] for names in paths.values())
    found: list[tuple[nn.Module, NormSpec, NormState]] = []
    suspects: list[Suspect] = []
    for module, names in paths.items():
        spec = identify(module)
        if spec is not None:
            found.append((module, spec, spec.read(module)))
        elif reason := suspicion(module):
            suspects.append(Suspect(names[0], class_of(module).__name__, reason, roles[names[0]]))
    channels = {paths[module][0]: state.channels for module, _, state in found}
    runs = feeds and channels and not any(isinstance(module, LazyModuleMixin) for module in paths)
    held: dict[nn.Module, list[str]] = {}
    for holder, attribute, module in hidden_references(paths):
        held.setdefault(module, []).append(f"{holder}.{attribute}" if holder else attribute)
    known = _feeds(model, paths, channels, example_inputs, suspects, held) if runs else {}
    owners = Counter(id(t) for m in paths for table in (m._parameters, m._buffers) for t in table.values())
    layers = tuple(
        Layer(
            paths[module][0],
            tuple(paths[module][1:]),
            spec,
            class_of(module).__name__,
            state,
            known.get(paths[module][0], UNKNOWN),
            tuple(held.get(module, ())),
            roles[paths[module][0]],
            state.weight is not None and owners[id(state.weight)] == 1,
        )
        for module, spec, state in found
    )
    return Inventory(layers, tuple(suspects), recorded=example_inputs is not None)


def as_inputs(example_inputs: Any) -> tuple[Any, ...]:
    """The forward's positional arguments from what callers pass as `example_inputs`."""
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def is_leaf(module: nn.Module) -> bool:
    """Modules a symbolic run takes whole: norms, known or suspected, and layers that can be folded into."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return identify(module) is not None or why_suspicious(module) is not None or producer_kind(module) is not None


def _feeds(
    model: nn.Module,
    paths: Mapping[nn.Module, list[str]],
    channels: Mapping[str, int],
    example_inputs: Any,
    suspects: list[Suspect],
    held: Collection[nn.Module],
) -> dict[str, Feed]:
    if identify(model) is not None:
        return {"": Feed("input", reason="the network is this norm alone")}
    feeds: dict[str, Feed] = {}
    regions: list[Region] = []
    if example_inputs is not None:
        region = _recorded(model, paths, channels, example_inputs)
        regions.append(region)
        feeds = analyse(paths, regions, channels)
    missing = {path: n for path, n in channels.items() if feeds.get(path, UNKNOWN) is UNKNOWN}
    if missing:
        # A part traced alone does not see what reaches it through an attribute elsewhere.
        feeds |= _traced(model, paths, missing, regions, {paths[module][0] for module in held})
    if not any(suspect.reason == IN_CODE for suspect in suspects):
        suspects += functional_batch_norm(regions)
    return feeds


def _traced(
    model: nn.Module,
    paths: Mapping[nn.Module, list[str]],
    missing: Mapping[str, int],
    regions: list[Region],
    doubts: set[str],
) -> dict[str, Feed]:
    """What symbolic runs, which are added to `regions`, show of the missing norms.

    In eval mode; where the code does more in training (auxiliary heads, say), or norms are left over, also in train
    mode.
    """
    traced = trace(model, is_leaf)
    regions += traced.regions
    doubts = doubts | traced.doubtful
    seen = {call.target for region in regions for call in region.calls if call.kind == "module"}
    left = {path: n for path, n in missing.items() if path not in seen}
    if not left and not any(branches_on_training(module) for module in paths):
        return analyse(paths, regions, missing, doubts)
    again = trace(model, is_leaf, training=True)
    regions += again.regions
    feeds = analyse(paths, regions, missing, doubts)
    return feeds | {p: f for p, f in analyse(paths, regions, missing, doubts | again.doubtful).items() if p in left}


def _recorded(
    model: nn.Module, paths: Mapping[nn.Module, list[str]], channels: Mapping[str, int], example_inputs: Any
) -> Region:
    try:
        return record(model, as_inputs(example_inputs), watched_modules(paths, channels))
    except Exception as error:  # whatever the model's forward raises on inputs it was not made for
        raise DataError(
            f"{type(model).__name__} cannot run on the example inputs ({type(error).__name__}: {first_line(error)})",
            hint="Give inputs of the shape its forward takes.",
        ) from error
