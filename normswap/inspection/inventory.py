"""Find every norm layer of a network, what feeds it, and everything that looks like a norm but is not known."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..display.overview import Table, counted, layers_table
from ..errors import DataError, first_line
from ..modules.path_ranges import ROOT
from ..modules.restore import trial_run
from ..modules.tree import aliases, held_elsewhere, module_at
from ..modules.wrappers import unwrapped
from ..norms.registry import class_of, identify, inner_of, why_suspicious
from ..norms.spec import NormSpec, NormState
from ..tracing.calls import KnownModules, producer_kind
from ..tracing.executed import Execution
from ..tracing.feeds import UNKNOWN, Feed, analyse
from ..tracing.ranks import vectors_by_code
from ..tracing.recorded import record
from ..tracing.run import Region
from ..tracing.symbolic import trace
from .example_inputs import as_inputs, guess_inputs, inputs_for
from .norm_shapes import positions_by_guess, vectors_only
from .roles import roles_of
from .suspects import IN_CODE, SCRIPTED, Suspect, functional_batch_norm, suspicion


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
    return inventory_of(unwrapped(model), example_inputs, feeds=feeds)


def inventory_of(model: nn.Module, example_inputs: Any = None, *, feeds: bool = True) -> Inventory:
    """`inspect`, for a network that nothing wraps."""
    paths = aliases(model)
    held = held_elsewhere(paths)
    roles = roles_of(names[0] for names in paths.values())
    owners = Counter(id(t) for m in paths for table in (m._parameters, m._buffers) for t in table.values())
    layers: list[Layer] = []
    suspects: list[Suspect] = []
    for module, names in paths.items():
        path, spec = names[0], identify(module)
        if spec is not None:
            state, elsewhere = spec.read(module), tuple(held.get(module, ()))
            class_name = class_of(module).__name__
            free = state.weight is not None and owners[id(state.weight)] == 1
            known_as = (path, tuple(names[1:]), spec, class_name)
            layers.append(Layer(*known_as, state, UNKNOWN, elsewhere, roles[path], free))
        elif reason := suspicion(module):
            suspects.append(Suspect(path, class_of(module).__name__, reason, roles[path]))
    if feeds and layers and not any(isinstance(module, LazyModuleMixin) for module in paths):
        known = KnownModules(paths, {layer.path: layer.state.channels for layer in layers})
        found = _feeds(model, known, example_inputs, suspects, [paths[module][0] for module in held])
        layers = [replace(layer, feed=found[layer.path]) for layer in layers]
    return Inventory(tuple(layers), tuple(suspects), recorded=example_inputs is not None)


def is_leaf(module: nn.Module) -> bool:
    """Modules a symbolic run takes whole: norms, known or suspected, and layers that can be folded into."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if identify(module) is not None or why_suspicious(module) is not None or inner_of(module) is not None:
        return True
    return producer_kind(module) is not None


def _feeds(
    model: nn.Module, known: KnownModules, example_inputs: Any, suspects: list[Suspect], held: list[str]
) -> dict[str, Feed]:
    """held: paths of modules that attributes hold too; functional batch norms join the suspects."""
    if "" in known.norms:
        return {path: Feed("input", reason="the network is this norm alone") for path in known.norms}
    leaves = set(filter(is_leaf, known.modules.values()))  # asked now: a symbolic run would see what asking computes
    traced = trace(model, leaves.__contains__)
    doubts = {
        *held,
        *traced.doubtful,
    }  # a part traced alone does not see what reaches it through an attribute elsewhere
    feeds = {} if example_inputs is not None else analyse(known, traced.regions, doubts)
    regions, settled = list(traced.regions), set[str]()
    if example_inputs is not None or any(feed.unsure for feed in feeds.values()):
        execution = Execution(known, traced.doubtful)
        regions += _recorded(model, known, example_inputs, execution)
        settled = execution.settled() - {*held}
        feeds = analyse(known, regions, doubts, settled)
    by_code = vectors_by_code(known, traced.regions, doubts)
    feeds |= _without_vectors(model, known, feeds, example_inputs, by_code)
    if not any(suspect.reason == IN_CODE for suspect in suspects):
        # A recorded run sees into suspects and compiled parts, which are named already; a symbolic one does not.
        named = any(suspect.reason == SCRIPTED or example_inputs is None for suspect in suspects)
        suspects += functional_batch_norm(traced.regions if named else regions)
    return feeds


def _without_vectors(
    model: nn.Module, known: KnownModules, feeds: Mapping[str, Feed], example_inputs: Any, by_code: Collection[str]
) -> dict[str, Feed]:
    """The feeds by a linear layer that are not known to be `(N, C)` in every run, now not foldable.

    by_code: norms that are given nothing else, as their network's code shows.
    """
    doubtful = [path for path, feed in feeds.items() if feed.foldable and feed.kind == "linear" and path not in by_code]
    linear = {known.modules[path]: path for path in doubtful}
    if not linear:
        return {}
    inputs = inputs_for(model, example_inputs)
    sure = vectors_only(model, inputs, linear, [known.norms[path] for path in linear.values()])
    reason = "its input may have more dimensions than two, and the linear layer's channels are the last"
    unsure = [path for path in linear.values() if path not in sure]
    return {path: replace(feeds[path], producers=(), foldable=False, reason=reason) for path in unsure}


def positions(model: nn.Module, inventory: Inventory) -> dict[str, int]:
    """How many positions each norm layer is given at least, from a run on guessed inputs; only those it reaches."""
    return positions_by_guess(model, {module_at(model, layer.path): layer.path for layer in inventory.layers})


def _recorded(model: nn.Module, known: KnownModules, example_inputs: Any, execution: Execution) -> list[Region]:
    """A run on the example inputs; where there are none, on those that it is found to take, if any."""
    if example_inputs is None:
        inputs = guess_inputs(model)
        if inputs is None:
            return []
        with trial_run(model), suppress(Exception):  # a stranger's forward, watched, may do what it likes
            # How large maps are depends on the inputs, and these are but a guess.
            region = record(model, inputs, known.watched, execution)
            return [replace(region, calls=[replace(c, input_shape=None) for c in region.calls])]
        return []
    try:
        return [record(model, as_inputs(example_inputs), known.watched, execution)]
    except Exception as error:  # whatever the model's forward raises on inputs it was not made for
        raise DataError(
            f"{type(model).__name__} cannot run on the example inputs ({type(error).__name__}: {first_line(error)})",
            hint="Give inputs of the shape its forward takes.",
        ) from error
