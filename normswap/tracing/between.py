"""What may stand between a layer and its norm without being in the way of a fold: nothing, and a cut of positions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

from torch import Tensor, fx, nn

from ..modules.gains import foreign_hooks


def is_identity(module: nn.Module) -> bool:
    """Whether a module gives back the very value that it is given, in training as in eval, by torch's own code."""
    return type(module).forward is nn.Identity.forward and "forward" not in module.__dict__


def hooked_between(module: nn.Module, leaf: Callable[[nn.Module], bool]) -> bool:
    """Whether hooks on a module, which runs go into, see what no call in it reads: it holds no norm and no layer.

    Of one that does, `feeds` knows on which side of the norm it is. leaf: whether runs take a module whole.
    """
    return foreign_hooks(module) and not any(map(leaf, nn.Module.modules(module)))


# --- positions cut away -------------------------------------------------------------------------------------------
#
# A causal convolution pads on both sides and cuts the surplus off, `y[:, :, :-n]`. Scale and shift of a channel are the
# same at all positions, so it makes no difference whether they come before the cut or after it.


def dims_cut(node: fx.Node) -> int:
    """How many dimensions, spatial ones in `(N, C, *)`, a call of a symbolic run needs if it is to cut positions alone.

    0 where it is no such call. `y[..., a:b, c:d]` needs two, `y[:, :, a:b]` no more than there are, which is one.
    """
    if node.op == "call_method" and node.target == "contiguous":
        return 1
    if node.op != "call_function" or node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return 0
    index: Sequence[Any] = node.args[1]
    behind = isinstance(next(iter(index), None), EllipsisType)
    if not behind and not (len(index) > 2 and all(_is_whole(each) for each in index[:2])):
        return 0
    cut = index[1 if behind else 2 :]
    if not cut or not all(isinstance(each, slice) for each in cut):
        return 0
    return len(cut) if behind else 1


def _is_whole(index: Any) -> bool:
    return isinstance(index, slice) and index.start is None and index.stop is None and index.step is None


def was_cut(name: str, args: Sequence[Any], out: Any) -> bool:
    """Whether an operation of a recorded run cut positions alone, or handed on all values. name: of the aten one."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not isinstance(out, Tensor):
        return False
    if name == "slice":
        dim = args[1] if len(args) > 1 else 0
        return out.shape == x.shape or dim % x.dim() > 1
    return name in ("alias", "clone")
