"""Which norms read sequences of a recurrent layer, and which of them read padding that can be told from the rest."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from ..modules.restore import trial_run

_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_PAD, _PACK = "_pad_packed_sequence", "_pack_padded_sequence"
_KEEPS_ZERO = {
    "transpose", "permute", "movedim", "swapaxes", "contiguous", "clone", "detach", "to", "float", "double", "half",
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "__getitem__", "narrow", "split", "chunk",
    "relu", "relu_", "tanh", "gelu", "silu", "leaky_relu", "elu", "dropout", "feature_dropout", "sum", "mul", "mul_",
    "__mul__", "__rmul__", "__imul__", "type", "bfloat16", "mT", "T", "adjoint", "select", "unbind", "index_select",
}  # fmt: skip
"""What gives 0 for 0, and no other value at a padded step."""
_TAKES_ALL = {"add", "add_", "__add__", "__radd__", "__iadd__", "cat", "stack", "sub", "__sub__"}
"""The same, where all of its tensors are 0 there and no number is added."""


class Padding:
    """What one run shows of norms, by their paths.

    padded: whether padded steps are zeros. sequences: which read an `(N, C, T)` made from what a recurrent layer gave;
    wide: which read any `(N, C, *)`; thin: which read `(N, C, T)`. packs: whether sequences are packed, so that
    they differ in length.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], norms: Mapping[nn.Module, str]) -> None:
        self.padded: dict[str, bool] = {}
        self.sequences: set[str] = set()
        self.wide: set[str] = set()
        self.thin: set[str] = set()
        watch = _Watch()

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if not tensors:
                return
            path, zeros = norms[module], watch.zeros.get(tensors[0])
            self.padded[path] = self.padded.get(path, True) and bool(zeros)
            if tensors[0].dim() > 2:
                self.wide.add(path)
                self.thin |= {path} if tensors[0].dim() == 3 else set()
                self.sequences |= {path} if zeros is not None else set()

        with ExitStack() as stack:
            stack.enter_context(trial_run(model))
            for module in norms:
                stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
            stack.enter_context(watch)
            model(*inputs)
        self.packs = watch.packs


class _Watch(TorchFunctionMode):
    """Follows what recurrent layers give. zeros: by tensor, whether its padded steps are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros: Any = WeakTensorKeyDictionary()
        self.packs = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property: of a view such as `x.mT` the name is on what has it
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [self.zeros[t] for t in given if t in self.zeros]
        if name == _PACK:
            self.packs = True
        zeros = self._zeros(name, args, known, len(given))
        if zeros is not None:
            for leaf in pytree.tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    self.zeros[leaf] = zeros
        return out

    def _zeros(self, name: str, args: Any, known: list[bool], tensors: int) -> bool | None:
        """Of what a function gives: whether padded steps are zeros; None where no recurrent layer is in it."""
        if name == _PAD:
            return len(args) > 3 and args[3] == 0
        if name in _RECURRENT:
            return False
        if not known:
            return None
        if name in _TAKES_ALL:
            return len(known) == tensors and all(known) and not any(isinstance(a, (int, float)) for a in args)
        return name in _KEEPS_ZERO and (all(known) or ("mul" in name and any(known)))
