"""Train a converted network at the learning rates of its original: weights at their old size, centralized gradients.

Why it needs both stands in docs/finetuning.md. A norm that follows its sample does not notice `(W, b)` times c if its
`eps` is taken times c^2; with c a power of two, both are exact in floating point, back and forth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..modules.gains import direction_of, gain_of, refresh
from ..modules.sharding import check_not_flattened, reshard, whole
from ..planning.plan import Transfer
from .bound import BoundStep, bound_after
from .exact_scaling import by_output_channel
from .record import Rename, record_of
from .undo_record import Order, ordered

_LIMIT = 2.0**10
_TINY = 1e-30


@dataclass(frozen=True)
class Sizes:
    """By which factors layers are larger for the time of a training, by the path of their norm."""

    factors: Mapping[str, float]

    def renamed(self, rename: Rename) -> Sizes | None:
        """The same under other paths."""
        found = {path: factor for old, factor in self.factors.items() if (path := rename(old)) is not None}
        return Sizes(found) if found else None

    def joined(self, other: Sizes) -> Sizes:
        """Of two parts of a network."""
        return Sizes({**self.factors, **other.factors})


@torch.no_grad()
def factors_of(model: nn.Module) -> dict[str, float]:
    """For each converted norm by its path, the power of two that brings the layers before it nearest to their old norm.

    Norms with running statistics, and all norms of a network that keeps no undo record, are left out; so are all of
    one that is stabilized already.
    """
    record = record_of(model)
    if record is None or not record.undo.complete or record.note(Sizes) is not None:
        return {}
    orders = {order.path: order for order in record.undo.orders}
    scales = {
        layer.path: ordered(layer.scale, Order("", orders[layer.path].rows)) if layer.path in orders else layer.scale
        for layer in record.undo.layers
    }
    found = {}
    for each in bound_after(model, record.plan):
        if not _applies(each) or not all(path in scales for path in each.step.producers):
            continue
        now = before = 0.0
        for path, layer in each.layers:
            weight = whole(gain_of(layer).detach()).double()  # a weight norm's g is as long as the weights are
            scale = by_output_channel(layer, scales[path].to(weight)).abs().clamp_min(_TINY)
            now += float(weight.square().sum())
            before += float((weight / scale).square().sum())
        if now > 0 and 0 < before < math.inf:
            factor = 2.0 ** round(math.log2(math.sqrt(before / now)))
            found[each.step.path] = min(max(factor, 1 / _LIMIT), _LIMIT)
    return {path: factor for path, factor in found.items() if factor != 1}


@torch.no_grad()
def rescale(model: nn.Module, factors: Mapping[str, float], *, back: bool = False, values: bool = True) -> None:
    """Multiply weight and bias of the layers before each norm by its factor, and its `eps` by the square; in place.

    values=False leaves weights and biases, which come from elsewhere.
    """
    record = record_of(model)
    if record is None:
        return
    now = dict(factors_in(model))
    for each in bound_after(model, record.plan):
        path = each.step.path
        factor = factors.get(path, 1.0)
        if factor == 1:
            continue
        factor = 1 / factor if back else factor
        for layer in each.producers if values else ():
            gain_of(layer).mul_(factor)
            layer.bias.mul_(factor)
            refresh(layer)
        each.norm.eps = each.norm.eps * factor**2
        total = now.pop(path, 1.0) * factor
        if total != 1:
            now[path] = total
    record.notes.pop(Sizes, None)
    if now:
        record.notes[Sizes] = Sizes(now)


@contextmanager
def stabilized(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, the network trains at the learning rates that its original takes; for a training loop of your own.

        with normswap.stabilized(gn_model):
            train(gn_model)

    Folded layers in front of `gn`, `ln`, `ln-channel` and `in` have their weights at about the size that they had
    before the fold (times a power of two, with `eps` to match, so that outputs stay as they are), and the gradients
    of these weights have no mean over each output channel. Build the optimizer before or within, all the same. At
    the end weights and `eps` go back; `normswap.save` within it saves the network as it is outside. Networks without
    such layers, and those converted with undo=False, train as they are. `finetune` does this by itself.

    model: a converted network, or any module that holds one, such as DistributedDataParallel or a compiled network.
    One that `torch.distributed.fsdp.fully_shard` shares out is sharded before, and all processes enter and leave.
    A state dict taken within it belongs to a network within it: `eps` is in no state dict.

    Raises OptionError for the older FullyShardedDataParallel.
    """
    check_not_flattened(model, "stabilized")
    reshard(model)
    with ExitStack() as stack:
        for root in [m for m in nn.Module.modules(model) if record_of(m) is not None]:
            stack.enter_context(_stabilized(root))
        stack.callback(reshard, model)
        yield model


@contextmanager
def _stabilized(root: nn.Module) -> Iterator[None]:
    nested = bool(factors_in(root))
    rescale(root, factors_of(root))
    trained = [] if nested else [weight for weight in folded_weights(root) if weight.requires_grad]
    hooks = [weight.register_post_accumulate_grad_hook(centralize) for weight in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if not nested:
            rescale(root, dict(factors_in(root)), back=True)


@contextmanager
def at_own_size(model: nn.Module) -> Iterator[None]:
    """Undo what `stabilized` does to the values, for a moment."""
    roots = [(m, dict(factors_in(m))) for m in nn.Module.modules(model) if record_of(m) is not None]
    reshard(model)
    for root, factors in roots:
        rescale(root, factors, back=True)
    try:
        yield
    finally:
        reshard(model)
        for root, factors in roots:
            rescale(root, factors)


def factors_in(model: nn.Module) -> Mapping[str, float]:
    """The factors that are in effect now."""
    record = record_of(model)
    sizes = None if record is None else record.note(Sizes)
    return {} if sizes is None else sizes.factors


def folded_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the layers that feed norms which follow their sample, those that `centralize` is for."""
    record = record_of(model)
    bound = () if record is None else bound_after(model, record.plan)
    weights = [direction_of(layer) for each in bound if _applies(each) for layer in each.producers]
    return [weight for weight in weights if weight.dim() > 1 and weight[0].numel() > 1]


def centralize(weight: Tensor) -> None:
    """Take the mean over each output channel's weights `(C, ...)` out of the gradient, in place (Yong et al. 2020)."""
    if weight.grad is not None:
        weight.grad.sub_(weight.grad.mean(dim=tuple(range(1, weight.dim())), keepdim=True))


def _applies(bound: BoundStep) -> bool:
    norm, step = bound.norm, bound.step
    follows = norm._buffers.get("running_mean") is None and isinstance(getattr(norm, "eps", None), float)
    return step.transfer is Transfer.FOLD and bool(step.producers) and follows
