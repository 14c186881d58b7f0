"""Fit the layer before each norm anew, so that from what now enters it, it gives what the original's layer gave.

Matching moments corrects two numbers of a channel. Where small groups have changed a layer's input, much of the error
is still linear in that input, and the layer before the norm can take it out: ridge regression of the original's
standardised value before the norm on the inputs that the converted network has there, towards the present weights.
One small system for each layer, from the same few images (as in layer-wise reconstruction of quantized networks:
Nagel et al. 2020, "AdaRound"; Hubara et al. 2021, "AdaQuant"; here without rounding, so in closed form).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conversion.exact_scaling import layer_digest, undo_layer
from ..conversion.undo_record import LayerUndo, Order, in_first_order
from ..modules.tree import module_at
from ..planning.plan import Step, Transfer
from ..tracing.calls import out_channels
from .norm_targets import Target, bare_output, first_input, standardized

RIDGE = 0.1
"""Of the mean power of an input: how strongly a weight is held where it is."""
ROWS, LARGEST = 64, 16384
"""How many positions are used for each number to be fitted, and how many suffice for all; never below an eighth of the
former. Their products with each other are what fitting costs."""
_ON_REGIONS = {"roi_heads", "roi_head"}
_AT_ONCE = 1 << 24  # numbers in the patches that are laid out at a time


@dataclass(eq=False)
class Refit:
    """A layer to fit, and what has arrived for it: by batch, its inputs, and the original's value before the norm.

    record: what folding and balancing have multiplied the original layer's output with and added, `(C,)`; order: how
    its channels have been put in another order since. aim: what is wanted instead, where the original has no running
    statistics: from the value before its norm, what that makes of it by each image's own.
    """

    path: str
    layer: Any
    target: Target
    record: LayerUndo
    order: Order | None = None
    aim: Callable[[Tensor], Tensor] | None = None
    inputs: dict[int, Tensor] = field(default_factory=dict)
    wanted: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def watching(self, job: Callable[[], int], arrive: Callable[[], None], batches: int) -> Iterator[None]:
        """Stop both networks before the norm, in all jobs, until the layer is fitted.

        job: gives the number of the one that runs; from `batches` on they are the original's.
        """

        def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.inputs[job()] = first_input(args, kwargs)

        def given(module: nn.Module, args: Any, kwargs: Any) -> None:
            i = job()
            arrive()
            if self._fits(self.inputs[i]):  # in place: a second one would be held for all images
                first_input(args, kwargs).copy_(self._again(i))

        def wanted(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = first_input(args, kwargs)
            self.wanted[job() - batches] = x if self.aim is None else self.aim(x)
            arrive()

        with ExitStack() as stack:
            hooks: tuple[tuple[Any, Any], ...] = (
                (self.layer, entering),
                (self.target.norm, given),
                (self.target.original, wanted),
            )
            for module, hook in hooks:
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def undo(self) -> LayerUndo:
        """How to get the layer back to what it was before the conversion."""
        return replace(self.record, given=layer_digest(*in_first_order(self.layer, self.order)))

    @torch.no_grad()
    def solve(self) -> None:
        """Set weight and bias. What the original gave is not needed any more."""
        wanted, self.wanted = self.wanted, {}
        batches = [(x, wanted[i]) for i, x in self.inputs.items() if i in wanted and len(x)]
        if batches and self._fits(batches[0][0]):
            with torch.autocast(self.layer.weight.device.type, enabled=False):
                rows = None if self.order is None else self.order.rows
                scale, shift = self.record.scale, self.record.shift
                if self.aim is not None:
                    scale, shift = torch.ones_like(scale), torch.zeros_like(shift)
                weight, bias = fitted(self.layer, batches, scale, shift, rows, level=self.aim is not None)
            self.layer.weight.copy_(weight)
            if self.layer.bias is not None:  # else what follows, which takes the mean out, has no use for one
                self.layer.bias.copy_(bias)

    def _fits(self, x: Tensor) -> bool:
        """Whether the layer is fitted on such an input; else it is as it was, and so is what the norm is given."""
        return not isinstance(self.layer, nn.Linear) or x.dim() == 2

    def _again(self, i: int) -> Tensor:
        """What the layer makes of its input in batch i now."""
        out: Tensor = self.layer.forward(self.inputs.pop(i))
        return out


def refits_of(
    model: nn.Module,
    targets: Iterable[Target],
    steps: Mapping[str, Step],
    records: Mapping[str, LayerUndo],
    orders: Mapping[str, Order],
) -> dict[str, Refit]:
    """Of the norms at these paths, those whose layer can be fitted: folded into a single plain convolution or linear
    layer, which has not been trained since and runs no hooks. What runs on regions that the network itself proposes is
    left out: both networks see regions of their own there, which cannot be compared one by one."""
    found = {}
    for target in targets:
        if not _ON_REGIONS.isdisjoint(target.path.split(".")):
            continue
        step = steps.get(target.path)
        if step is None or len(step.producers) != 1 or target.original is None:
            continue
        if step.transfer.waits:
            layer = module_at(model, step.producers[0])
            if can_fit(layer, bias=step.transfer is Transfer.ABSORB):
                before = records.get(step.producers[0]) or untouched(step.producers[0], layer)
                aim = partial(bare_output if target.carriers else standardized, target.original)
                found[target.path] = Refit(before.path, layer, target, before, aim=aim)
            continue
        if step.transfer is not Transfer.FOLD:
            continue
        layer, record = module_at(model, step.producers[0]), records.get(step.producers[0])
        order = orders.get(step.producers[0])
        original = undo_layer(layer, record, order) if record is not None and can_fit(layer) else None
        if record is not None and original is not None:
            kept = LayerUndo(record.path, record.scale, record.shift, record.bias, weight=original[0].clone())
            found[target.path] = Refit(record.path, layer, target, kept, order)
    return found


def untouched(path: str, layer: Any) -> LayerUndo:
    """How to get back to a layer as it is now."""
    weight = layer.weight.detach().clone()
    ones = weight.new_ones(out_channels(layer))
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return LayerUndo(path, ones, torch.zeros_like(ones), bias, weight=weight)


def can_fit(layer: nn.Module, *, bias: bool = True) -> bool:
    """Whether the layer is a sum over patches of its input: torch's own convolution (1d, 2d) or linear layer.

    bias: whether it must have one.
    """
    own = isinstance(layer._parameters.get("weight"), nn.Parameter)
    own = own and not (bias and layer._parameters.get("bias") is None)
    plain = own and not layer._forward_hooks and not layer._forward_pre_hooks
    if isinstance(layer, nn.Linear):
        return plain
    convolution = isinstance(layer, (nn.Conv1d, nn.Conv2d)) and type(layer).forward in _FORWARDS
    return plain and convolution and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward)


def fitted(
    layer: Any,
    batches: list[tuple[Tensor, Tensor]],
    scale: Tensor,
    shift: Tensor,
    order: Tensor | None = None,
    *,
    level: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weight and bias that minimise `||layer(x) - (scale z + shift)||^2 + ridge ||weight - weight_now||^2`.

    batches: pairs of the layer's input x and the original layer's output z, `(N, C, *)` each. order: of the channels,
    where the layer has another one than z, scale and shift. Sums over few images each are pooled in float64; positions
    are the same of each image, whatever its batch. level: the weights to stay near to are those that give the wanted
    values best with a scale and a shift of each channel.
    """
    # A layer is linear in what it sums over at a position, its patch, to which a 1 is added for the bias. With all
    # patches as columns of U, the change D of the weights solves `D (U U' + ridge) = E U'`, E being what the present
    # weights leave of the wanted values. The ridge then pulls towards the present weights, not towards 0. A grouped
    # convolution is one such system for each of its groups.
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.detach()
    bias = weight.new_zeros(out_channels(layer)) if layer.bias is None else layer.bias.detach()
    now = torch.cat([weight.reshape(groups, -1, weight[0].numel()), bias.view(groups, -1, 1)], 2).float()
    size = now.shape[2]
    positions = max(ROWS // 8 * size, min(ROWS * size, LARGEST))
    wanted = -(-positions // sum(len(x) for x, _ in batches))
    gram = torch.zeros(groups, size, size, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(now.shape, dtype=torch.float64, device=weight.device)
    for x, z in batches:
        count = max(1, _AT_ONCE // max(1, size * groups * min(wanted, z[0, 0].numel())))
        for part, out in zip(x.split(count), z.split(count), strict=True):
            value = out.float().flatten(2) if out.dim() > 2 else out.float().unsqueeze(2)
            at = _scattered(value.shape[2], wanted).to(value.device)
            rows = _patches(layer, part.float(), at, groups)
            aim = (value[..., at] * _column(scale, value) + _column(shift, value)).movedim(1, 0)
            aim = aim if order is None else aim[order.to(aim.device)]
            gram += (rows @ rows.mT).double()
            cross += (aim.reshape(groups, -1, rows.shape[2]) @ rows.mT).double()
    if level:
        now = _levelled(now.double(), gram, cross)
    cross -= now.double() @ gram  # what the present weights leave of it
    if not bool(torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        return weight, bias
    # Held in proportion to the inputs' mean power, so that the ridge means the same for loud and for quiet inputs.
    power = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None].clamp_min(1e-30)
    held = torch.cat([RIDGE * power.expand(-1, size - 1), 1e-6 * power], 1)  # the bias is free
    change = _solved((gram + torch.diag_embed(held)).cpu(), cross.mT.cpu()).mT.to(gram.device)
    new = now + change
    return new[..., :-1].reshape(weight.shape).to(weight.dtype), new[..., -1].reshape(-1).to(bias.dtype)


def _levelled(now: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """Weights and biases, `(groups, channels, inputs + 1)`, with each channel scaled and shifted by least squares.

    So that it comes nearest to what is wanted of it: they are the weights to stay near to.
    """
    count, given = gram[:, -1:, -1:], now @ gram
    sums, aims = given[..., -1:], cross[..., -1:]
    varies = (given * now).sum(2, keepdim=True) - sums.square() / count
    together = (cross * now).sum(2, keepdim=True) - sums * aims / count
    slope = torch.where(varies > 0, together / varies.clamp_min(1e-30), 1.0)
    now = slope * now
    now[..., -1:] += (aims - slope * sums) / count
    return now


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like)[:, None]


def _scattered(positions: int, wanted: int) -> Tensor:
    """Indices of about so many positions, all of them where there are fewer: evenly many of each part of the image.

    Even steps through the rows would meet few of the columns, and the border's in half of the cases; steps of the
    golden ratio, which no size divides, meet all.
    """
    if positions <= wanted:
        return torch.arange(positions)
    steps = torch.arange(wanted, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2)
    return (steps.frac() * positions).long().unique()


def _solved(system: Tensor, right: Tensor) -> Tensor:
    """Of symmetric systems, by Cholesky's way where they are positive to rounding, which is twice as fast."""
    factor, failed = torch.linalg.cholesky_ex(system)
    return torch.linalg.solve(system, right) if bool(failed.any()) else torch.cholesky_solve(right, factor)


def _patches(layer: Any, x: Tensor, at: Tensor, groups: int) -> Tensor:
    """What the layer sums over at some positions, and a 1: `(groups, inputs + 1, N * positions)`."""
    if isinstance(layer, nn.Linear):
        found = x.unsqueeze(2).unsqueeze(2)
    else:
        kernel, dilation, padding, stride = layer.kernel_size, layer.dilation, layer.padding, layer.stride
        # The indices of all taps of each position in the padded image, so that nothing else is laid out.
        x = F.pad(x, [p for side in reversed(padding) for p in (side, side)])
        sizes, index, rest = x.shape[2:], torch.zeros(1, 1, dtype=torch.long, device=x.device), at
        outs = [(n - d * (k - 1) - 1) // s + 1 for n, k, d, s in zip(sizes, kernel, dilation, stride, strict=True)]
        step = 1
        for n, out, k, d, s in reversed(list(zip(sizes, outs, kernel, dilation, stride, strict=True))):
            taps = torch.arange(k, device=x.device) * d
            place = taps[:, None] + (rest % out) * s
            index = (place[:, None] * step + index).flatten(0, 1)
            rest, step = rest // out, step * n
        found = x.flatten(2)[:, :, index]  # (N, channels, taps, positions)
    found = found.movedim(0, 2)  # (channels, taps, N, positions)
    rows = found.reshape(groups, -1, found.shape[2] * found.shape[3])
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
