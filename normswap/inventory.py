"""Find every norm layer of a network, what feeds it, and everything that looks like a norm but is not known."""

from __future__ import annotations

import ast
import functools
import inspect as python_inspect
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin

from . import norms as _norms  # noqa: F401  (registers the norm types)
from .errors import DataError, OptionError
from .feeds import UNKNOWN, Feed, analyse, producer_kind, watched_modules
from .graph import Region, record, trace
from .registry import class_of, identify, looks_batch, why_suspicious
from .roles import roles_of
from .spec import NormSpec, NormState
from .surgery import aliases, hidden_references
from .uses import branches_on_training, definitions_of


@dataclass(frozen=True)
class Layer:
    """One norm layer. `path` is its first name, `aliases` the others; `state` aliases the module's tensors.

    held_by: attributes that hold it beside the tables of children, as `PATH.ATTRIBUTE`; a swap cannot reach them.
    role: the part of the network it is in: `backbone`, `fpn` or `head`.
    """

    path: str
    aliases: tuple[str, ...]
    spec: NormSpec
    class_name: str
    state: NormState
    feed: Feed
    held_by: tuple[str, ...] = ()
    role: str = "backbone"

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
class Suspect:
    """A module that normalizes, or may, and that normswap cannot convert."""

    path: str
    class_name: str
    reason: str
    role: str = "backbone"


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
    if not isinstance(model, nn.Module):
        raise OptionError(f"expected a torch.nn.Module, got {type(model).__name__}")
    paths = aliases(model)
    roles = roles_of(names[0] for names in paths.values())
    found: list[tuple[nn.Module, NormSpec, NormState]] = []
    suspects: list[Suspect] = []
    for module, names in paths.items():
        spec = identify(module)
        if spec is not None:
            found.append((module, spec, spec.read(module)))
        elif reason := _suspicion(module):
            suspects.append(Suspect(names[0], class_of(module).__name__, reason, roles[names[0]]))
    channels = {paths[module][0]: state.channels for module, _, state in found}
    runs = feeds and channels and not any(isinstance(module, LazyModuleMixin) for module in paths)
    held: dict[nn.Module, list[str]] = {}
    for holder, attribute, module in hidden_references(paths):
        held.setdefault(module, []).append(f"{holder}.{attribute}" if holder else attribute)
    known = _feeds(model, paths, channels, example_inputs, suspects, held) if runs else {}
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
    if not any(suspect.reason == _IN_CODE for suspect in suspects):
        suspects += _functional_batch_norm(regions)
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


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for quoting it in a sentence."""
    return (str(error).strip() or "no message").splitlines()[0][:300]


_SCRIPTED = "a scripted module cannot be changed: convert the original, then script it"
_IN_CODE = "its code calls a functional batch norm, which no module swap can reach"


def _suspicion(module: nn.Module) -> str | None:
    if isinstance(module, LazyModuleMixin):
        return "it is not initialised: run one forward pass first, then convert"
    if looks_batch(module) and isinstance(module, torch.jit.ScriptModule):
        return _SCRIPTED
    if reason := why_suspicious(module):
        return reason
    cls: type = type(module)
    return _IN_CODE if _calls_batch_norm(cls) else None


@functools.cache
def _calls_batch_norm(cls: type) -> bool:
    """Whether the methods of a class call a functional batch norm on anything but a layer's weight.

    (Weight standardization does that: timm's StdConv2d.)
    """
    if cls.__module__.startswith(("torch.nn.", "torch.ao.", "normswap.")) or cls is object:
        return False
    own = [f for f in map(python_inspect.unwrap, vars(cls).values()) if python_inspect.isfunction(f)]
    scopes = [f.__globals__ for f in own]
    suspicious = any("batch_norm" in f.__code__.co_names or _known_names(f) for f in own)
    definitions = definitions_of(cls) if suspicious else []
    if suspicious and not definitions:
        return True
    calls = (node for definition in definitions for node in ast.walk(definition) if isinstance(node, ast.Call))
    return any(_is_functional(call, scopes[0]) for call in calls) or any(map(_calls_batch_norm, cls.__bases__))


def _known_names(function: FunctionType) -> bool:
    return any(_is_batch_norm(function.__globals__.get(name)) for name in function.__code__.co_names)


def _is_batch_norm(value: object) -> bool:
    return any(value is f for f in (F.batch_norm, torch.batch_norm, torch.native_batch_norm))


def _is_functional(call: ast.Call, scope: Mapping[str, Any]) -> bool:
    """Whether a call is one of `F.batch_norm`, under whatever name, on something that is not a weight."""
    names: list[str] = []
    node: ast.AST = call.func
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return False
    if node.id in scope:
        value = scope[node.id]
        for name in reversed(names):
            value = getattr(value, name, None)
        found = _is_batch_norm(value)
    else:  # imported inside the method
        module = not names or node.id in ("F", "functional", "nn", "torch")
        found = module and (names or [node.id])[0] == "batch_norm"
    on_weight = call.args and any(isinstance(n, ast.Attribute) and n.attr == "weight" for n in ast.walk(call.args[0]))
    return found and not on_weight


_FUNCTIONAL = {
    "batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm", "_batch_norm_impl_index", "_batch_norm_no_update", "_batch_norm_with_update",
}  # fmt: skip


def _functional_batch_norm(regions: list[Region]) -> list[Suspect]:
    """Batch norms that a run showed outside of any module (called by a free function, say), on anything but weights."""
    reason = "a functional batch norm runs in it, which no module swap can reach"
    found = {region.path for region in regions for i in range(len(region.calls)) if _normalizes_data(region, i)}
    return [Suspect(path, "function", reason) for path in sorted(found)]


def _normalizes_data(region: Region, index: int) -> bool:
    call = region.calls[index]
    if call.kind != "function" or call.target not in _FUNCTIONAL:
        return False
    waiting, seen = list(call.inputs[:1]), set()
    while waiting:
        source = waiting.pop()
        if region.calls[source].kind in ("input", "module"):
            return True
        seen.add(source)
        waiting += [s for s in region.calls[source].inputs if s not in seen]
    return False
