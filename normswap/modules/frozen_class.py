"""Modules whose running statistics stay put whatever mode they are switched to, and what that remembers.

A pinned module keeps its tensors, its hooks and its place; only its class is exchanged for a subclass that inherits
`forward` and never leaves eval mode. That survives `train()`, a deep copy, pickling and wrappers, changes no key of
the state dict, and needs nothing of a forward, so every norm with running statistics can be pinned alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

ATTRIBUTE = "_normswap_frozen"
WANTED = "_normswap_training"  # what `training` of a pinned module was set to last


@dataclass
class Freeze:
    """What a frozen norm remembers; kept on the module as `_normswap_frozen`.

    trained: its requires_grad flags before, by parameter. tensors: copies of what is frozen, by name.
    training: its own flag and its parent's before its statistics were pinned (None: it had no parent).
    """

    trained: dict[str, bool] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    training: tuple[bool, bool | None] | None = None


class FrozenStatistics(nn.Module):
    """Mixed in before a norm's class: `training` stays False, running statistics are not reset."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":
            self.__dict__[WANTED], value = value, False
        super().__setattr__(name, value)

    def reset_running_stats(self) -> None:
        """Nothing: `torch.optim.swa_utils.update_bn` resets what it then estimates anew."""

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), "statistics frozen"]))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """By the class beneath, which can be found by its name when the module is unpickled."""
        return _empty, (beneath(type(self)),), super().__reduce_ex__(2)[2]


def freeze_of(module: nn.Module) -> Freeze | None:
    """What a frozen norm remembers; None for a module that is not frozen."""
    return module.__dict__.get(ATTRIBUTE)


def beneath(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before it was pinned."""
    classes: tuple[Any, ...] = cls.__mro__
    return next(c for c in classes if not issubclass(c, FrozenStatistics))


_PINNED: dict[type[nn.Module], type[nn.Module]] = {}  # one for each class, so that copies have the same


def _pinned(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _PINNED:
        own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _PINNED[cls] = type(cls.__name__, (FrozenStatistics, cls), own)
    return _PINNED[cls]


def _empty(cls: type[nn.Module]) -> nn.Module:
    pinned = _pinned(cls)
    return pinned.__new__(pinned)


def _give_class(module: nn.Module, pin: bool) -> None:
    """Exchange the class; for a parametrized module, the one beneath the class that parametrize made for it alone."""
    cls = type(module)
    made = cls if parametrize.is_parametrized(module) else None
    base = beneath(cls.__mro__[1] if made else cls)
    new = _pinned(base) if pin else base
    if made is not None:
        own = {name: value for name, value in vars(made).items() if name not in ("__dict__", "__weakref__")}
        new = type(made.__name__, (new,), own)
    module.__class__ = new


def pin(module: nn.Module) -> None:
    """Hold a module's running statistics, in place. Raises TypeError where its class cannot be exchanged."""
    training = module.training
    _give_class(module, True)
    module.training = training


def unpin(module: nn.Module, memory: Freeze, parent: nn.Module | None) -> None:
    """Let the running statistics go, in place; what `training` is then is what it was, or the parent's new mode."""
    before, parent_before = memory.training or (module.training, None)
    wanted = module.__dict__.pop(WANTED, before)
    _give_class(module, False)
    if parent is None:
        module.training = wanted
    else:
        module.training = before if parent.training == parent_before else parent.training


def frozen_tensors(module: nn.Module, memory: Freeze) -> Iterator[tuple[str, Tensor | None]]:
    """What is frozen in a module, as it is now."""
    now = {**dict(module.named_parameters()), **module._buffers}
    return ((name, now.get(name)) for name in memory.tensors)


def hand_over(new: nn.Module, old: nn.Module, *, statistics: bool) -> None:
    """Freeze the norm that took another's place as the other was; the copies are of the new one's tensors.

    statistics: whether the new one has running statistics that training would move.
    """
    memory = freeze_of(old)
    if memory is None:
        return
    parameters = {name: p for name, p in new.named_parameters() if name in memory.trained}
    statistics = statistics and memory.training is not None
    tensors = {**parameters, **(dict(statistics_of(new)) if statistics else {})}
    if not tensors:
        return
    new.__dict__[ATTRIBUTE] = Freeze(
        {name: memory.trained[name] for name in parameters},
        {name: tensor.detach().clone() for name, tensor in tensors.items()},
        memory.training if statistics else None,
    )
    if statistics:
        pin(new)


def statistics_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A norm's buffers: running statistics and their counters."""
    return ((name, tensor) for name, tensor in module._buffers.items() if tensor is not None)
