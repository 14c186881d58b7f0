"""Choose sign and size of each channel so that its group's mean and variance differ less from sample to sample.

What a group norm loses against BN is how far a sample's group mean is from 0 and its group variance from 1. Both
depend on the channels' signs and sizes, which are free: the layer before multiplies channel c by t_c, gamma is
divided by it, and a norm with fixed statistics would not notice. Channels of one group that rise together in the
same samples cancel in its mean when half of them are negated; a channel whose power jumps from sample to sample
disturbs its group less when it is smaller. Nothing is added to the network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..conversion.apply import standardization
from ..conversion.exact_scaling import by_output_channel, fold_gain, folded_bias, scaled, undo_layer
from ..conversion.undo_record import LayerUndo, Undo
from ..modules.gains import gain_of, refresh
from ..modules.tree import module_at
from ..planning.plan import Step, Transfer
from .moments import Rows
from .norm_targets import Target, set_parameter, state_of, statistics_of

LARGEST = 2.0
"""Sizes stay within 1/2 and 2, so that no channel dominates its group and learning rates keep their meaning."""
_STEPS, _RATE = 6, 0.6


@dataclass
class Spread:
    """Of each sample (and call): mean and mean square of the original norm's standardised input, `(N, C)` float64.

    unit: how its input was standardised, see `Step`.
    """

    unit: bool = False
    means: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)

    def add(self, rows: Rows, original: nn.Module) -> None:
        """rows: of what enters the original norm, which has running statistics."""
        if rows.values.numel() == 0:
            return
        mean = statistics_of(original)[0].double()
        scale = standardization(state_of(original), unit=self.unit)[0].double()
        self.means.append((rows.mean - mean) * scale)
        square = rows.square - 2 * mean * rows.mean + mean.square()
        self.squares.append(square.clamp_min(0) * scale.square())

    def centred(self) -> tuple[Tensor, Tensor]:
        """All samples, `(N, C)` each, with the mean over them taken out (beta makes up for it)."""
        means, squares = torch.cat(self.means), torch.cat(self.squares)
        mean = means.mean(0)
        return means - mean, (squares - 2 * mean * means + mean.square()).clamp_min(0)


def signs(means: Tensor, groups: int) -> Tensor:
    """1 or -1 for each channel, `(C,)`, so that the group means of `sign * means` vary little over the samples.

    means: `(N, C)` float64, centred. Minimises `s' A s` for each group, A its covariance: greedily, the largest
    channel first, then by single flips while any helps. The exact minimum is a partition problem (NP-hard).
    """
    samples, channels = means.shape
    part = means.view(samples, groups, -1).movedim(1, 0)
    cov = part.mT @ part
    size = cov.diagonal(dim1=1, dim2=2)
    least = 1e-6 * size.sum(1, keepdim=True)  # below this it is rounding that decides
    order = size.argsort(dim=1, descending=True, stable=True)
    sign, pull = torch.zeros_like(size), torch.zeros_like(size)
    for i in order.unbind(1):
        at = i[:, None]
        s = torch.where(pull.gather(1, at) > least, -1.0, 1.0).to(size)
        sign.scatter_(1, at, s)
        pull += s * _row(cov, at)
    for _ in range(4 * size.shape[1]):
        gain, at = (sign * pull - size).max(1, keepdim=True)
        s = torch.where(gain > least, -2 * sign.gather(1, at), 0.0)
        if not bool(s.any()):
            break
        sign.scatter_add_(1, at, s)
        pull += s * _row(cov, at)
    better = (sign * pull).sum(1) < 0.99 * cov.sum((1, 2))
    return torch.where(better[:, None], sign, 1.0).view(channels)


def _row(cov: Tensor, at: Tensor) -> Tensor:
    return cov.gather(1, at[:, :, None].expand(-1, 1, cov.shape[2])).squeeze(1)


def sizes(means: Tensor, squares: Tensor, gamma: Tensor, groups: int, eps: float) -> Tensor:
    """A factor in [1/2, 2] for each channel, `(C,)`, that brings the group norm's output closer to BN's.

    means, squares: `(N, C)` float64 of the (signed) channels; gamma: `(C,)`. Minimises over t, by a few gradient
    steps, the squared difference of `k_c (t_c x - m_g) r_g` and x weighted by gamma^2, with `r_g = 1 / sqrt(v_g +
    eps)` and k_c such that the mean gain is 1; per-sample moments are all it depends on.
    """
    samples, channels = means.shape
    # The output's error in channel c and sample n is `x (r_n / r - 1) - m_n r_n / (t_c r)`, r being the mean gain,
    # which moment matching takes out. Squared and summed over positions and over the group's channels it needs three
    # sums of each sample: of the powers q and of 1 / t^2, each weighted by gamma^2, and of the mixed term m / t.
    # (groups, samples, channels of a group); what depends on the group alone is then a product with a vector.
    m, q = (x.view(samples, groups, -1).movedim(1, 0).contiguous() for x in (means, squares))
    weight = gamma.double().square().view(groups, -1, 1)
    weight = weight / weight.mean().clamp_min(1e-30)
    power, share = q @ weight, 1 / m.shape[2]
    free, velocity = torch.zeros_like(weight), torch.zeros_like(weight)
    for i in range(_STEPS):
        with torch.enable_grad():
            t = (math.log(LARGEST) * torch.tanh(free.requires_grad_())).exp()  # between 1 / LARGEST and LARGEST
            centre = (m @ t) * share
            gain = ((q @ t.square()) * share - centre.square() + eps + 1e-6).rsqrt()
            relative = gain / gain.mean(1, keepdim=True)
            a, b = relative - 1, centre * relative
            error = power * a.square() + b.square() * (weight / t.square()).sum(1, keepdim=True)
            loss = (error - 2 * a * b * (m @ (weight / t))).sum()
            (slope,) = torch.autograd.grad(loss, free)
        # Slopes are brought to one size in each group, so that groups move alike whatever their part in the loss is;
        # momentum and a falling rate settle six steps where plain ones would still swing.
        floor = 1e-3 * loss.detach() / channels + 1e-30  # below it a slope is rounding, and moves nothing
        velocity = 0.5 * velocity + slope / (slope.square().mean(1, keepdim=True).sqrt() + floor)
        free = free.detach() - _RATE * (1 - i / _STEPS) * velocity
    return (math.log(LARGEST) * torch.tanh(free)).exp().view(channels)


def can_balance(target: Target, step: Step) -> bool:
    """Whether channels can be scaled before the norm, and share groups in which that matters."""
    groups = target.state.num_groups
    return step.transfer.standardizes and groups is not None and groups < target.state.channels


@torch.no_grad()
def rescale(model: nn.Module, target: Target, step: Step, factor: Tensor, undo: Undo | None) -> list[LayerUndo]:
    """Multiply the channels that enter a norm by `factor`, `(C,)`, and divide its gamma by it.

    Returns new undo records of the layers changed, by which `revert` still restores them bit for bit.
    """
    records = {record.path: record for record in undo.layers} if undo is not None else {}
    changed = []
    if step.transfer is Transfer.PRESCALE:
        standardize = module_at(model, step.path).get_submodule("standardize")
        for name in ("scale", "shift"):
            buffer = standardize.get_buffer(name)
            buffer.copy_(buffer * factor)
    for path in step.producers:
        record = _rescale_layer(module_at(model, path), factor, records.get(path))
        if record is not None:
            changed.append(record)
    state = target.state
    gamma = torch.ones_like(factor) if state.weight is None else state.weight.detach().double()
    set_parameter(target.norm, "weight", gamma / factor)
    return changed


def _rescale_layer(layer: nn.Module, factor: Tensor, record: LayerUndo | None) -> LayerUndo | None:
    """As if the layer had been folded with the new factor right away, so that it can be undone exactly."""
    weight, bias = gain_of(layer), layer.get_parameter("bias")
    original = undo_layer(layer, record) if record is not None else None
    if record is None or original is None:  # nothing was kept, or it was trained since: no exact way back anyway
        weight.copy_(scaled(weight, by_output_channel(layer, factor.to(record.scale if record else weight))))
        bias.copy_(bias * factor)
        refresh(layer)
        return None
    scale, shift = (t.to(weight.device) * factor.to(weight.device, t.dtype) for t in (record.scale, record.shift))
    by_channel = by_output_channel(layer, scale)
    weight.copy_(original[0])
    new = LayerUndo(record.path, scale, shift, record.bias, *fold_gain(layer, by_channel))
    bias.copy_(folded_bias(original[1], scale, shift, weight.dtype))
    refresh(layer)
    return new


def factors(spread: Spread, target: Target, gamma: Tensor | None, eps: float, order: Tensor | None = None) -> Tensor:
    """Sign times size of each channel, `(C,)` float64.

    order: the one in which the channels are going to stand, which says who shares a group; the result is in the
    present order.
    """
    groups = target.state.num_groups or 1
    means, squares = spread.centred()
    weight = torch.ones_like(means[0]) if gamma is None else gamma.detach()
    order = torch.arange(means.shape[1], device=means.device) if order is None else order
    means, squares, weight = means[:, order], squares[:, order], weight[order.to(weight.device)]
    sign = signs(means, groups)
    found = sign * sizes(means * sign, squares, weight, groups, eps)
    return found[order.argsort()]
