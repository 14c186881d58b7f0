"""What may stand between a layer and its norm without being in the way of a fold."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..modules.gains import foreign_hooks


def is_identity(module: nn.Module) -> bool:
    """Whether a module gives back the very value that it is given, in training as in eval, by torch's own code."""
    return type(module).forward is nn.Identity.forward and "forward" not in module.__dict__


def hooked_between(module: nn.Module, leaf: Callable[[nn.Module], bool]) -> bool:
    """Whether hooks on a module, which runs go into, see what no call in it reads: it holds no norm and no layer.

    Of one that does, `feeds` knows on which side of the norm it is. leaf: whether runs take a module whole.
    """
    return foreign_hooks(module) and not any(map(leaf, nn.Module.modules(module)))
