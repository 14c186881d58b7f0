"""Convolutions of a class of somebody's own, which pads its input in its own way, say: whether one can be folded into.

Scaling the weight and bias of output channel `c` scales output channel `c` wherever the output is that of one
convolution by this very weight and bias, and nothing else came of them. Runs on inputs of several sizes show that,
operation by operation; what of the module's code they pass over must not be able to make it otherwise.
"""

from __future__ import annotations

import copy
import dis
from collections.abc import Iterator
from contextlib import ExitStack
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..modules.attributes import MODULE_ATTRIBUTES, SCALARS, leaves_of
from ..modules.gains import WEIGHT_NORM_NAMES, without_weight_norm
from ..modules.restore import evaluating, undisturbed
from ..modules.storage import overlap, span_of
from .followed import ATTRIBUTES, LOCALS, WALKS, Followed, codes_of, mentions, steps_of

_STORES = ("STORE_FAST", "STORE_DEREF", "DELETE_FAST")
_known: dict[tuple[Any, ...], bool] = {}


def is_convolution(module: _ConvNd) -> bool:
    """Whether a module with a forward of its own is one convolution of its input, however that is prepared.

    Its weight must be a parameter of its own, or that of a weight norm, whose computation is then no part of the code
    that is looked at. Modules of one class and equal settings are looked at once.
    """
    module = without_weight_norm(module)
    if module is None or (module._parameters.get("bias") is None and module.bias is not None):
        return False
    if _holds_more(module) or _hooked(module):
        return False
    settings = _settings_of(module)
    if settings is None:
        return False
    if settings not in _known:
        _known[settings] = _shown(module)
    return _known[settings]


def _holds_more(module: nn.Module) -> bool:
    """Whether there are other values that it might compute with, now or once its input is another."""
    inner = [m for m in nn.Module.modules(module) if m is not module]
    tensors = [t for m in inner for t in (*m._parameters.values(), *m._buffers.values())]
    others = [t for name, t in module._parameters.items() if name not in ("weight", "bias")]
    return any(t is not None for t in (*tensors, *others, *module._buffers.values()))


def _hooked(module: nn.Module) -> bool:
    """Whether something stands between its children and it, or stands in for a method."""
    inner = [m for m in nn.Module.modules(module) if m is not module]
    return "_conv_forward" in module.__dict__ or any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in inner
    )


def _settings_of(module: Any) -> tuple[Any, ...] | None:
    """All that its code may go by; None where it holds what cannot be compared."""
    cls, found = type(module), []
    for name, value in module.__dict__.items():
        if name in MODULE_ATTRIBUTES:
            continue
        if not callable(value) and any(type(leaf) not in SCALARS for leaf in leaves_of(value)):
            return None
        found.append((name, repr(value)))
    weight = module._parameters["weight"]
    children = [(name, repr(child)) for name, child in module._modules.items()]
    return (cls, cls.forward, cls._conv_forward, weight.shape, weight.dtype, *found, *children)


def _shown(module: _ConvNd) -> bool:
    """Whether runs show it, in eval and in training, and nothing that they pass over can make it otherwise."""
    probe = copy.copy(module)
    made = torch.zeros(module.out_channels, dtype=module.weight.dtype, device=module.weight.device)
    probe._parameters = dict(module._parameters)
    probe._parameters["bias"] = nn.Parameter(made, requires_grad=False)  # as it will have after the fold
    watch = _Watch(probe)
    reach = max(d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True))
    ran = dict.fromkeys((False, True), 0)
    for training in ran:
        for size in (reach, reach + 1, 2 * reach + 3):  # small, because layers may be wide
            x = torch.zeros(1, module.in_channels, *[size] * len(module.kernel_size))
            with ExitStack() as stack:
                stack.enter_context(undisturbed(probe))
                stack.enter_context(evaluating(probe, training))
                stack.enter_context(torch.no_grad())
                try:
                    sound = watch.run(x.to(made))
                except Exception:  # too small an input, say
                    continue
            if not sound:
                return False
            ran[training] += 1
    return all(ran.values()) and not watch.may_differ()


class _Watch(TorchDispatchMode):
    """Watches the operations of one convolution of somebody's own, and the code that calls them."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.spans = [span_of(t) for t in module._parameters.values() if t is not None]
        self.made: list[Tensor] = []
        self.followed = Followed({"": module}, self._counts)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def run(self, x: Tensor) -> bool:
        """Whether the output is that of one convolution by the module's weight and bias, which nothing else read."""
        self.made, self.sound = [], True
        with self, self.followed.watching():
            out = self.module.forward(x)
        whole = len(self.made) == 1 and out is self.made[0] and out.shape[1] == self.module.out_channels
        return self.sound and whole

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.convolution:
            x, weight, bias, *_, transposed, _, groups = args
            own = self.module._parameters
            same = weight is own["weight"] and bias is own["bias"] and not self._is_own(x)
            turned = isinstance(self.module, _ConvTransposeNd)
            self.sound &= same and transposed == turned and groups == self.module.groups
            self.made.append(out)
        else:
            read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.sound &= not any(self._is_own(t) or self._is_made(t) for t in read)
        return out

    def _is_own(self, tensor: Tensor) -> bool:
        span, own = span_of(tensor), self.module._parameters.values()
        return any(tensor is t for t in own) or any(overlap(span, each) for each in self.spans)

    def _is_made(self, tensor: Tensor) -> bool:
        return any(tensor is out or overlap(span_of(tensor), span_of(out)) for out in self.made)

    def _counts(self, value: Any) -> bool:
        """The module, its weight and bias, and what the convolution has put out."""
        return value is self.module or (isinstance(value, Tensor) and (self._is_own(value) or self._is_made(value)))

    def may_differ(self) -> bool:
        """Whether code that no run went through could read the weight, or give something else back."""
        codes, own = self.followed.codes(""), codes_of(self.module)
        return not self.followed.entered("") or any(self._may_differ(code, code in own, codes) for code in codes)

    def _may_differ(self, code: CodeType, own: bool, ran: set[CodeType]) -> bool:
        done, counts = self.followed.seen["", code], self.followed.names["", code]
        if own:
            counts = counts - {code.co_varnames[0]}
        elif not counts:
            return False  # a helper that prepares the input: whatever it makes of it is convolved
        reads = {*self.module._parameters, *WEIGHT_NORM_NAMES, *WALKS, "super", "__class__"}
        for step in steps_of(code):
            if step.offset in done:
                continue
            names = set(step.argval) if isinstance(step.argval, tuple) else {str(step.argval)}
            if step.opname.startswith("RETURN") or (step.opname.startswith((*LOCALS, *_STORES)) and names & counts):
                return True
            if step.opname.startswith(ATTRIBUTES) and names & reads:
                return True
        inner = [const for const in code.co_consts if isinstance(const, CodeType) and const not in ran]
        return any(mentions(const, counts | reads) for const in inner) or any(_leaves_a_value(code, done))


def _leaves_a_value(code: CodeType, done: set[int]) -> Iterator[bool]:
    """For each stretch of code that was passed over, whether it may hand a value to the code that follows.

    `a if flag else b` does, where a statement of its own leaves nothing on the stack.
    """
    depth = 0
    for step in steps_of(code):
        if step.offset in done:
            depth = 0
            continue
        depth += dis.stack_effect(step.opcode, step.arg if step.opcode >= dis.HAVE_ARGUMENT else None, jump=False)
        if "JUMP" in step.opname:
            yield depth != 0
    yield depth != 0
