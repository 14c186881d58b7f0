"""The norm types normswap knows: register one, find one by name or by a module."""

from __future__ import annotations

import functools
import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import OptionError, did_you_mean
from ..modules.frozen_class import beneath
from .spec import NormSpec, NormState, Options

_BY_NAME: dict[str, NormSpec] = {}
_BY_CLASS: dict[type, NormSpec] = {}
_BY_CLASS_NAME: dict[str, NormSpec] = {}


def register(spec: NormSpec) -> NormSpec:
    """Make a norm type known under its name and its module classes. Raises ValueError when one is taken."""
    if spec.name in _BY_NAME:
        raise ValueError(f"a norm named {spec.name!r} is already registered")
    taken = [c for c in spec.classes if c in _BY_CLASS] + [n for n in spec.class_names if n in _BY_CLASS_NAME]
    if taken:
        raise ValueError(f"{taken[0]} is already registered")
    _BY_NAME[spec.name] = spec
    _BY_CLASS.update(dict.fromkeys(spec.classes, spec))
    _BY_CLASS_NAME.update(dict.fromkeys(spec.class_names, spec))
    _of_class.cache_clear()
    return spec


_INNER: dict[str, str] = {
    "torch_geometric.nn.norm.batch_norm.BatchNorm": "module",
    "normswap.norms._split.SplitNorm": "norm",
}
# Where that is set, a wrapper computes from its norm's statistics itself, which no other norm has.
_NOT_WHERE = {"torch_geometric.nn.norm.batch_norm.BatchNorm": "allow_single_element"}


def register_norm(cls: type[nn.Module], *, like: str, inner: str | None = None) -> None:
    """Tell normswap that modules of a class of your own compute what a norm that it knows does.

    like: the name of that norm, such as `"bn"`. inner: the attribute of the child that is the norm, for a class that
    only hands its input on to one; that child is then converted, and what holds it stays. Without it the class itself
    is read as that norm: by its `num_features`, `eps`, `weight`, `bias`, `running_mean` and `running_var`.

    The class counts as it is: subclasses only where they inherit `forward`. `convert` proves what it makes of them as
    of all others. Raises OptionError for what is no class of modules, an unknown norm, or a class that is known.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise OptionError(f"cls: expected a class of torch.nn.Module, got {cls!r}")
    spec, name, own = norm_named(like), _dotted(cls), cast(Any, cls)
    if _of_class(own, own.forward) is not None or (inner is None and name in _INNER):
        raise OptionError(f"{cls.__name__} is known already")
    if inner is not None:
        if not isinstance(inner, str):
            raise OptionError(f"inner: expected the name of a child, got {inner!r}")
        _INNER[name] = inner
    elif not spec.needs_statistics or spec.fuses:
        raise OptionError(f"only norms with running statistics can be read from another class, not {like}")
    else:
        _BY_CLASS[cls] = spec
        _of_class.cache_clear()


def inner_of(module: nn.Module) -> str | None:
    """The name of the child that does all of a module's work and is a known norm; None for most modules."""
    cls: Any = type(module)
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return None
    for base in cls.__mro__:
        name = _dotted(base)
        if getattr(base, "forward", None) is not cls.forward:
            break
        if name in _INNER and not getattr(module, _NOT_WHERE.get(name, ""), False):
            child = module._modules.get(_INNER[name])
            return _INNER[name] if child is not None and identify(child) is not None else None
    return None


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def specs() -> tuple[NormSpec, ...]:
    """Every registered norm type, in order of registration."""
    return tuple(_BY_NAME.values())


def targets() -> tuple[str, ...]:
    """Names that `to=` and rules accept."""
    return tuple(spec.name for spec in _BY_NAME.values() if spec.build is not None)


def norm_named(name: str) -> NormSpec:
    """The norm type of that name. Raises OptionError, with near matches, for an unknown one."""
    spec = _BY_NAME.get(name)
    if spec is None or spec.build is None:
        raise OptionError(f"unknown norm {name!r}; known: {', '.join(targets())}", hint=suggestion(name))
    return spec


def suggestion(name: str) -> str | None:
    """A hint with the norms that a name may mean; None where none is near."""
    usual = {alias: spec.name for spec in specs() for alias in spec.aliases}
    return did_you_mean(name, targets(), usual=usual)


def exact_from(spec: NormSpec) -> tuple[str, ...]:
    """Names of the types from which a conversion to this one computes the same in eval mode.

    Of two norms that are fixed maps in eval mode, each can be the other.
    """
    maps = [other.name for other in specs() if other.needs_statistics and not other.fuses]
    return tuple(maps) if spec.needs_statistics else spec.exact_from


def build(spec: NormSpec, state: NormState, options: Options) -> nn.Module:
    """A module of that type from a layer's state. Raises OptionError for a type that is a source only."""
    if spec.build is None:
        raise OptionError(f"{spec.name} cannot be built; known targets: {', '.join(targets())}")
    return spec.build(state, options)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class; for a parametrized or a frozen module, the class it had before."""
    cls = type(module)
    return beneath(cls.__mro__[1] if parametrize.is_parametrized(module) else cls)


def identify(module: nn.Module) -> NormSpec | None:
    """The norm type of a module, or None if it is not a norm that normswap knows.

    A subclass counts as its base only if it inherits `forward` unchanged: then it computes the same. So does an
    instance only without a `forward` of its own. A scripted or traced module is none that could be changed.
    """
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return None
    cls: Any = class_of(module)
    if (known := _of_class(cls, cls.forward)) is not None:
        return known
    return next((spec for spec in _BY_NAME.values() if spec.matches is not None and spec.matches(module)), None)


def derived_from(module: nn.Module) -> NormSpec | None:
    """The norm type that a module's class is or derives from, whatever its own `forward` does."""
    return next((_BY_CLASS[cls] for cls in class_of(module).__mro__ if cls in _BY_CLASS), None)


def states_in(model: nn.Module) -> list[NormState]:
    """The states of all norms of a network."""
    return [spec.read(module) for module in nn.Module.modules(model) if (spec := identify(module)) is not None]


@functools.lru_cache(maxsize=4096)
def _of_class(cls: type[nn.Module], forward: object) -> NormSpec | None:
    """The norm type of a class whose `forward` that is (a class may get another one while a program runs)."""
    for candidate in cls.__mro__:
        if getattr(candidate, "forward", None) is not forward:
            break
        spec = _BY_CLASS.get(candidate) or _BY_CLASS_NAME.get(_dotted(candidate))
        if spec is not None:
            return spec
    return None


def why_suspicious(module: nn.Module) -> str | None:
    """Why a module that `identify` does not know looks like a norm with batch statistics; None if it does not."""
    batch_like = isinstance(module, nn.modules.batchnorm._NormBase) or looks_batch(module)
    pair = None if batch_like else _statistics_like(module)
    if not (batch_like or pair) or identify(module) is not None:
        return None
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, so what it computes is not known"
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return f"{class_of(module).__name__} overrides the forward of a norm class that normswap knows"
    if pair is not None:
        return f"{class_of(module).__name__} holds {' and '.join(pair)}, and normswap does not know its formula"
    return f"{class_of(module).__name__} has running statistics, but normswap does not know its formula"


def _statistics_like(module: nn.Module) -> tuple[str, str] | None:
    """The names of two tensors that no gradient moves and that may be mean and variance of channels, as `ra_mean`.

    A `std` counts beside a running or moving mean alone: `mean` and `std` mostly prepare images.
    """
    tensors: dict[str, Tensor | None] = {**module._buffers, **module._parameters}
    if not any("mean" in name for name in tensors):
        return None
    fixed = {name: t for name, t in tensors.items() if t is not None and not t.requires_grad and _is_vector(t)}
    for name in fixed:
        if (found := _MEAN.search(name)) is None:
            continue
        before, after = name[: found.start()], name[found.end() :]
        for word in ("var", "variance", *(("std",) if _RUNNING.search(name) else ())):
            other = f"{before}{word}{after}"
            if other in fixed and fixed[other].shape == fixed[name].shape:
                return name, other
    return None


_MEAN = re.compile(r"(?<![a-z])mean(?![a-z])")
_RUNNING = re.compile(r"(?<![a-z])(running|moving|ra|ema|pop|population|avg)(?![a-z])")


def _is_vector(tensor: Tensor) -> bool:
    """Whether one dimension alone is larger than 1: a value for each channel."""
    return sum(size > 1 for size in tensor.shape) == 1


def looks_batch(module: nn.Module) -> bool:
    """Whether a module holds running statistics by the name that every library gives them."""
    return "running_var" in module._buffers
