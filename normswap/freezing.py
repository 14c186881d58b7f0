"""Freeze norm layers in place, so that nothing in them moves while the rest trains; undo it; prove it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from .errors import Fix, OptionError, Text
from .modules.frozen_class import (
    ATTRIBUTE,
    Freeze,
    FrozenStatistics,
    freeze_of,
    frozen_tensors,
    pin,
    statistics_of,
    unpin,
)
from .modules.path_ranges import matches
from .modules.tree import aliases, module_at
from .modules.wrappers import check_module
from .norms.registry import class_of, derived_from, identify, looks_batch

Patterns = str | Iterable[str]
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, AveragedModel; torch.compile


@dataclass(frozen=True)
class FrozenLayer:
    """One frozen norm. changes: by tensor, the largest absolute change since it was frozen, inf where none can be told.

    trainable: parameters that require a gradient again though they are frozen.
    """

    path: str
    norm: str
    changes: Mapping[str, float]
    trainable: tuple[str, ...] = ()


@dataclass(frozen=True)
class FrozenDrift:
    """The result of `frozen_drift`; true if anything moved."""

    layers: tuple[FrozenLayer, ...]

    @property
    def largest(self) -> float:
        """The largest absolute change of any frozen tensor; 0 exactly when nothing moved."""
        return max((change for layer in self.layers for change in layer.changes.values()), default=0.0)

    @property
    def moved(self) -> bool:
        """Whether anything moved."""
        return self.largest > 0

    def __bool__(self) -> bool:
        return self.moved

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        return {"moved": self.moved, "largest": self.largest, "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        count = len(self.layers)
        moved = [
            f"{layer.path or '(root)'}.{name}: moved by up to {change:.3g}"
            for layer in self.layers
            for name, change in layer.changes.items()
            if change > 0
        ]
        free = [f"{x.path or '(root)'}.{name}: requires a gradient again" for x in self.layers for name in x.trainable]
        summary = f"{count} frozen layer{'s' * (count != 1)}: {'something moved' if moved else 'nothing moved'}"
        return "\n".join([summary, *moved, *free])


def freeze(model: nn.Module, stats: bool = True, affine: bool = True, modules: Patterns | None = None) -> nn.Module:
    """Freeze norm layers of `model`, in place, until `unfreeze`. Returns `model`.

    stats: norms with running statistics use them and never update them, whatever mode the model is in: their
    `training` stays False, also after `model.train()`, and `update_bn` neither resets nor estimates them. Their class
    becomes a subclass of what it was; tensors, keys of the state dict and hooks stay. affine: gamma and beta require
    no gradient, and a gradient they have is dropped, so that no optimizer moves them. modules: a pattern or several
    (shell wildcards over paths, or a module and all below it), None for every norm.

    Freezing a layer twice changes nothing; freezing more of it adds to it. In a copy, an unpickled model, a wrapper
    (DistributedDataParallel, torch.compile, AveragedModel) the layers are frozen too.

    Raises OptionError, with nothing changed, for a pattern that matches no norm, for `stats` where a BN tracks none or
    no layer has any, and for layers that cannot be frozen yet (lazy, on the meta device) or any more (scripted).
    """
    if not (stats or affine):
        raise OptionError(
            Text(Fix("stats", False), " with ", Fix("affine", False), " freezes nothing"),
            hint="Set one of them to True.",
        )
    found = _selected(model, modules)
    if not found:
        raise OptionError(f"{type(model).__name__} has no norm layer to freeze")
    if stats:
        _check_statistics(found, affine)
    _check_tensors(found)
    before = _trained_before(model)
    for path, module in found.items():
        memory = freeze_of(module) or Freeze()
        if stats and _has_statistics(module):
            _hold_statistics(model, path, module, memory)
        if affine:
            _hold_affine(module, memory, before)
        if memory.tensors:
            module.__dict__[ATTRIBUTE] = memory
    return model


def unfreeze(
    model: nn.Module, modules: Patterns | None = None, *, stats: bool = True, affine: bool = True
) -> nn.Module:
    """Undo `freeze`, in place, for all layers or those that `modules` matches. Returns `model`.

    requires_grad is as it was before; `training` is too, unless the module that holds the layer was switched since:
    then it is that one's. Layers that are not frozen are left alone. stats=False or affine=False keeps that part
    frozen. Raises OptionError for a pattern that matches no norm.
    """
    for path, module in _selected(model, modules).items():
        memory = freeze_of(module)
        if memory is None:
            continue
        if stats and isinstance(module, FrozenStatistics):
            unpin(module, memory, _parent(model, path))
            memory.training = None
            _forget(memory, [name for name, _ in statistics_of(module)])
        if affine:
            _release_affine(model, module, memory)
        if not memory.tensors:
            del module.__dict__[ATTRIBUTE]
    return model


@torch.no_grad()
def frozen_drift(model: nn.Module) -> FrozenDrift:
    """How far everything that `freeze` froze has moved since then: not at all, if nobody changed it by hand.

    Compared are the values now with copies from the moment of freezing, in the dtype of now; 0 means equal. Values
    that a state dict brought in since count as moved. Raises OptionError when nothing is frozen.
    """
    check_module(model)
    layers = []
    for module, names in aliases(model).items():
        memory = freeze_of(module)
        if memory is None:
            continue
        changes = {name: _change(memory.tensors[name], now) for name, now in frozen_tensors(module, memory)}
        free = tuple(n for n, p in module.named_parameters() if n in memory.trained and p.requires_grad)
        layers.append(FrozenLayer(names[0], class_of(module).__name__, changes, free))
    if not layers:
        raise OptionError("nothing of this model is frozen", hint="Call normswap.freeze(model) before training.")
    return FrozenDrift(tuple(layers))


# --- which layers ---------------------------------------------------------------------------------------------------


def _is_norm(module: nn.Module) -> bool:
    """Norms that normswap knows, and all that look like one: in eval mode their statistics rest, whatever they do."""
    return looks_batch(module) or identify(module) is not None


def _selected(model: nn.Module, modules: Patterns | None) -> dict[str, nn.Module]:
    """Norms by their first path, those that some pattern covers."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"expected a torch.nn.Module, got {type(model).__name__}")
    norms = {tuple(names): module for module, names in aliases(model).items() if _is_norm(module)}
    if modules is None:
        return {names[0]: module for names, module in norms.items()}
    patterns = [modules] if isinstance(modules, str) else list(modules)
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise OptionError(f"modules must be a pattern such as 'backbone.*', or several, got {modules!r}")
    known = {names: [variant for name in names for variant in _variants(name)] for names in norms}
    missing = [p for p in patterns if not any(matches(p, path) for paths in known.values() for path in paths)]
    if missing:
        raise _no_match(missing, [path for paths in known.values() for path in paths])
    covered = (n for n, paths in known.items() if any(matches(p, path) for p in patterns for path in paths))
    return {names[0]: norms[names] for names in covered}


def _variants(path: str) -> Iterator[str]:
    """A path, and as the model's owner knows it, without what wrappers put before it."""
    yield path
    while path.startswith(_WRAPPERS):
        path = path.partition(".")[2]
        yield path


def _no_match(patterns: list[str], paths: list[str]) -> OptionError:
    parts = {part.rsplit(".", n)[0] for part in paths for n in range(part.count(".") + 1)}
    near = [
        name
        for pattern in patterns
        for name in difflib.get_close_matches(pattern.rstrip(".*"), sorted(parts), n=3, cutoff=0.4)
    ]
    shown = list(dict.fromkeys(near)) or paths[:3]
    return OptionError(
        f"no norm layer matches {', '.join(map(repr, patterns))}",
        hint=f"Near names: {', '.join(shown)}." if shown else "The model has no norm layer.",
    )


def _parent(model: nn.Module, path: str) -> nn.Module | None:
    return module_at(model, path.rpartition(".")[0]) if path else None


# --- statistics -----------------------------------------------------------------------------------------------------


def _has_statistics(module: nn.Module) -> bool:
    return module._buffers.get("running_mean") is not None and module._buffers.get("running_var") is not None


def _expects_statistics(module: nn.Module) -> bool:
    spec = derived_from(module)
    return spec is not None and spec.updates_statistics


def _check_statistics(found: Mapping[str, nn.Module], affine: bool) -> None:
    without = [p or "(root)" for p, m in found.items() if _expects_statistics(m) and not _has_statistics(m)]
    if without:
        raise OptionError(
            f"{len(without)} batch norm layer{'s' * (len(without) != 1)} without running statistics to freeze: "
            f"{', '.join(without)}",
            hint=Text(
                Fix("stats", False),
                " freezes gamma and beta alone. convert(to='bn', missing_statistics='later') and ",
                "then calibrate give them statistics.",
            ),
        )
    if not affine and not any(map(_has_statistics, found.values())):
        raise OptionError(
            Text(
                f"none of the {len(found)} norm layers has running statistics; ",
                Fix("stats", True),
                " with ",
                Fix("affine", False),
                " freezes nothing",
            ),
            hint=Text(Fix("affine", True), " freezes gamma and beta."),
        )


def _check_tensors(found: Mapping[str, nn.Module]) -> None:
    problems = []
    for path, module in found.items():
        if isinstance(module, torch.jit.ScriptModule):
            problems.append(f"{path or '(root)'} is scripted: freeze the original, then script it")
        elif isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            problems.append(f"{path or '(root)'} is lazy: run the model once first")
        elif any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            problems.append(f"{path or '(root)'} is on the meta device: load its weights first")
    if problems:
        raise OptionError("\n  ".join(["these layers cannot be frozen:", *problems]))


def _hold_statistics(model: nn.Module, path: str, module: nn.Module, memory: Freeze) -> None:
    for name, tensor in statistics_of(module):
        memory.tensors.setdefault(name, tensor.detach().clone())
    if not isinstance(module, FrozenStatistics):
        parent = _parent(model, path)
        memory.training = (module.training, None if parent is None else parent.training)
        pin(module)


# --- gamma and beta -------------------------------------------------------------------------------------------------


def _affine_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """A norm's own parameters; not those of an activation in it."""
    return {n: p for n, p in module.named_parameters() if "." not in n or n.startswith("parametrizations.")}


def _trained_before(model: nn.Module) -> dict[nn.Parameter, bool]:
    """The requires_grad flags that frozen layers remember, by parameter: two norms may share one."""
    known: dict[nn.Parameter, bool] = {}
    for module in nn.Module.modules(model):
        if memory := freeze_of(module):
            parameters = dict(module.named_parameters())
            known |= {parameters[n]: flag for n, flag in memory.trained.items() if n in parameters}
    return known


def _hold_affine(module: nn.Module, memory: Freeze, before: dict[nn.Parameter, bool]) -> None:
    for name, parameter in _affine_of(module).items():
        memory.trained.setdefault(name, before.setdefault(parameter, parameter.requires_grad))
        memory.tensors.setdefault(name, parameter.detach().clone())
        parameter.requires_grad_(False)
        parameter.grad = None  # an optimizer takes another step on a gradient that is left, be it zero


def _release_affine(model: nn.Module, module: nn.Module, memory: Freeze) -> None:
    parameters, trained = dict(module.named_parameters()), dict(memory.trained)
    memory.trained.clear()
    _forget(memory, trained)
    shared = _trained_before(model)
    for name, flag in trained.items():
        if name in parameters and parameters[name] not in shared:
            parameters[name].requires_grad_(flag)


def _forget(memory: Freeze, names: Iterable[str]) -> None:
    for name in names:
        memory.tensors.pop(name, None)


def _change(then: Tensor, now: Tensor | None) -> float:
    """The largest absolute change, 0 if all are equal (NaN to NaN too); inf where values cannot be compared."""
    if now is None or then.shape != now.shape:
        return float("inf")
    if then.is_meta or now.is_meta:
        return 0.0 if then.is_meta else float("inf")
    then = then.to(now)
    if torch.equal(then, now) or not then.numel():
        return 0.0
    change = (now.double() - then.double()).abs()
    change[then.isnan() & now.isnan()] = 0
    return float(change.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
