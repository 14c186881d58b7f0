"""What looks like a norm but is not known: unknown classes, scripted modules, batch norms called as functions."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin

from ..norms.registry import inner_of, looks_batch, why_suspicious
from ..tracing.run import Region
from ..tracing.source_files import definitions_of


@dataclass(frozen=True)
class Suspect:
    """A module that normalizes, or may, and that normswap cannot convert."""

    path: str
    class_name: str
    reason: str
    role: str = "backbone"


SCRIPTED = "a scripted module cannot be changed: convert the original, then script it"
IN_CODE = "its code calls a functional batch norm, which no module swap can reach"


def suspicion(module: nn.Module) -> str | None:
    """Why a module that is not a known norm may normalize all the same; None for most."""
    if isinstance(module, LazyModuleMixin):
        return "it is not initialised: run one forward pass first, then convert"
    if looks_batch(module) and isinstance(module, torch.jit.ScriptModule):
        return SCRIPTED
    if reason := why_suspicious(module):
        return reason
    if inner_of(module) is not None:
        return None
    cls: type = type(module)
    return IN_CODE if _calls_batch_norm(cls) else None


@functools.cache
def _calls_batch_norm(cls: type) -> bool:
    """Whether the methods of a class call a functional batch norm on anything but a layer's weight.

    (Weight standardization does that: timm's StdConv2d.)
    """
    if cls.__module__.startswith(("torch.nn.", "torch.ao.", "normswap.")) or cls is object:
        return False
    own = [f for f in map(inspect.unwrap, vars(cls).values()) if inspect.isfunction(f)]
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


def functional_batch_norm(regions: list[Region]) -> list[Suspect]:
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
