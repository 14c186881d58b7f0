"""Find every norm layer of a network, what feeds it, and everything that looks like a norm but is not known."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..display.overview import Table, counted, layers_table
from ..errors import DataError, first_line
from ..modules.path_ranges import ROOT
from ..modules.tree import aliases, check_module, hidden_references, module_at
from ..modules.wrappers import unwrapped
from ..norms.registry import class_of, identify, why_suspicious
from ..norms.spec import NormSpec, NormState
from ..tracing.calls import producer_kind
from ..tracing.feeds import UNKNOWN, Feed, analyse, watched_modules
from ..tracing.recorded import record
from ..tracing.run import Region
from ..tracing.symbolic import trace
from .example_inputs import guess_inputs
from .norm_shapes import positions_by_guess, vectors_only
from .roles import roles_of
from .suspects import IN_CODE, Suspect, functional_batch_norm, suspicion


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
        if self.spec.fixed or (fixed and self.state.affine and not self.state.training):
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

    def __repr__(self) -> str:
        kinds = counted(self.layers, lambda layer: layer.spec.name)
        return f"<Inventory: {len(self.layers)} norm layers ({kinds}), {len(self.suspects)} suspects>"

    def __str__(self) -> str:
        tables = [layers_table(self.layers)] if self.layers else []
        if self.suspects:
            tables.append(self._suspects())
        return "\n\n".join(map(str, tables)) or "no norm layer"

    def _repr_html_(self) -> str:
        tables = [layers_table(self.layers), *([self._suspects()] if self.suspects else [])]
        return f"<p>{html.escape(repr(self)[1:-1])}</p>" + "".join(table.to_html() for table in tables)

    def _suspects(self) -> Table:
        return Table(("module", "type", "why"), tuple((s.path or ROOT, s.class_name, s.reason) for s in self.suspects))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"layers": [x.to_dict() for x in self.layers], "suspects": [asdict(s) for s in self.suspects]}


def inspect(model: nn.Module, example_inputs: Any = None, *, feeds: bool = True) -> Inventory:
    """List every norm layer of `model` and what feeds it. Changes nothing.

    example_inputs: a tensor, or a tuple of the forward's arguments; the network is then run once on them, in eval
    mode without gradients. It is traced symbolically in any case, and a layer counts as foldable only where neither
    shows another use of it.
    feeds=False skips either run; every feed is then unknown.

    Of a network in DataParallel, torch.compile and the like, what is within, under its own names. Raises DataError
    when the network cannot be run on the example inputs.
    """
    check_module(model)
    model = unwrapped(model)
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
    regions: list[Region] = []
    if example_inputs is not None:
        regions.append(_recorded(model, paths, channels, example_inputs))
    traced = trace(model, is_leaf)
    regions += traced.regions
    # A part traced alone does not see what reaches it through an attribute elsewhere.
    doubts = {paths[module][0] for module in held} | traced.doubtful
    feeds = analyse(paths, regions, channels, doubts)
    feeds |= _without_vectors(model, {names[0]: module for module, names in paths.items()}, feeds, example_inputs)
    if not any(suspect.reason == IN_CODE for suspect in suspects):
        suspects += functional_batch_norm(regions)
    return feeds


def _without_vectors(
    model: nn.Module, modules: Mapping[str, nn.Module], feeds: Mapping[str, Feed], example_inputs: Any
) -> dict[str, Feed]:
    """The feeds by a linear layer that are not known to be `(N, C)` in every run, now not foldable."""
    linear = {modules[path]: path for path, feed in feeds.items() if feed.foldable and feed.kind == "linear"}
    if not linear:
        return {}
    inputs = guess_inputs(model) if example_inputs is None else as_inputs(example_inputs)
    sure = vectors_only(model, inputs, linear)
    reason = "its input may have more dimensions than two, and the linear layer's channels are the last"
    unsure = [path for path in linear.values() if path not in sure]
    return {path: replace(feeds[path], producers=(), foldable=False, reason=reason) for path in unsure}


def positions(model: nn.Module, inventory: Inventory) -> dict[str, int]:
    """How many positions each norm layer is given at least, from a run on guessed inputs; only those it reaches."""
    return positions_by_guess(model, {module_at(model, layer.path): layer.path for layer in inventory.layers})


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
