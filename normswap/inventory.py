"""Find every norm layer of a network, what feeds it, and everything that looks like a norm but is not known."""

from __future__ import annotations

import ast
import functools
import inspect as python_inspect
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from . import norms as _norms  # noqa: F401  (registers the norm types)
from .errors import DataError
from .feeds import UNKNOWN, Feed, analyse, producer_kind, watched_modules
from .graph import Region, record, trace
from .registry import class_of, identify, why_suspicious
from .spec import NormSpec, NormState
from .surgery import aliases, hidden_references
from .uses import branches_on_training


@dataclass(frozen=True)
class Layer:
    """One norm layer. `path` is its first name, `aliases` the others; `state` aliases the module's tensors."""

    path: str
    aliases: tuple[str, ...]
    spec: NormSpec
    class_name: str
    state: NormState
    feed: Feed

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


@dataclass(frozen=True)
class Inventory:
    """Every norm layer in traversal order, and every suspect. `traced`: parts of the network a run has covered."""

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
    paths = aliases(model)
    found: list[tuple[nn.Module, NormSpec, NormState]] = []
    suspects: list[Suspect] = []
    for module, names in paths.items():
        spec = identify(module)
        if spec is not None:
            found.append((module, spec, spec.read(module)))
        elif reason := _suspicion(module):
            suspects.append(Suspect(names[0], class_of(module).__name__, reason))
    channels = {paths[module][0]: state.channels for module, _, state in found}
    known = _feeds(model, paths, channels, example_inputs, suspects) if feeds and channels else {}
    layers = tuple(
        Layer(
            paths[module][0],
            tuple(paths[module][1:]),
            spec,
            class_of(module).__name__,
            state,
            known.get(paths[module][0], UNKNOWN),
        )
        for module, spec, state in found
    )
    return Inventory(layers, tuple(suspects), recorded=example_inputs is not None)


def as_inputs(example_inputs: Any) -> tuple[Any, ...]:
    """The forward's positional arguments from what callers pass as `example_inputs`."""
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def is_leaf(module: nn.Module) -> bool:
    """Modules a symbolic run takes whole: norms, known or suspected, and layers that can be folded into."""
    return identify(module) is not None or why_suspicious(module) is not None or producer_kind(module) is not None


def _feeds(
    model: nn.Module,
    paths: Mapping[nn.Module, list[str]],
    channels: Mapping[str, int],
    example_inputs: Any,
    suspects: list[Suspect],
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
        feeds |= _traced(model, paths, missing, regions)
    if not suspects:
        suspects += _functional_batch_norm(regions, channels)
    return feeds


def _traced(
    model: nn.Module, paths: Mapping[nn.Module, list[str]], missing: Mapping[str, int], regions: list[Region]
) -> dict[str, Feed]:
    """What symbolic runs, which are added to `regions`, show of the missing norms.

    In eval mode; where the code does more in training (auxiliary heads, say), or norms are left over, also in train
    mode.
    """
    hidden = {module for *_, module in hidden_references(model, paths)}
    doubts = {paths[module][0] for module in hidden}  # a part traced alone does not see its use from elsewhere
    traced = trace(model, is_leaf)
    regions += traced.regions
    doubts |= traced.doubtful
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


def _suspicion(module: nn.Module) -> str | None:
    if isinstance(module, LazyModuleMixin) and isinstance(module, nn.modules.batchnorm._NormBase):
        return "it is not initialised: run one forward pass first, then convert"
    if reason := why_suspicious(module):
        return reason
    if _calls_batch_norm(type(module)) and not isinstance(module._modules.get("batch_norm"), nn.Module):
        return "its code calls a functional batch norm, which no module swap can reach"
    return None


@functools.cache
def _calls_batch_norm(cls: type) -> bool:
    """Whether the methods of a class call `batch_norm` other than as their own attribute `self.batch_norm`."""
    if cls.__module__.startswith(("torch.nn.", "torch.ao.", "normswap.")):
        return False
    own = [f for f in vars(cls).values() if python_inspect.isfunction(f)]
    if not any("batch_norm" in f.__code__.co_names for f in own):
        return any(_calls_batch_norm(base) for base in cls.__bases__ if base is not object)
    try:
        tree = ast.parse(textwrap.dedent(python_inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return True
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(
        (isinstance(f, ast.Name) and f.id == "batch_norm")
        or (isinstance(f, ast.Attribute) and f.attr == "batch_norm" and isinstance(f.value, ast.Name | ast.Attribute)
            and ast.unparse(f.value) in ("F", "functional", "torch", "nn.functional", "torch.nn.functional"))
        for f in calls
    )


_FUNCTIONAL = {"batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
               "cudnn_batch_norm", "_batch_norm_impl_index", "_batch_norm_no_update", "_batch_norm_with_update"}  # fmt: skip


def _functional_batch_norm(regions: list[Region], norms: Mapping[str, int]) -> list[Suspect]:
    """Batch norms that a run showed outside of any module (called by a free function, say)."""
    return [
        Suspect(region.path, "function", "a functional batch norm runs in it, which no module swap can reach")
        for region in regions
        if any(call.kind == "function" and call.target in _FUNCTIONAL for call in region.calls)
    ]
