"""Choose each layer's number of groups by what it does to the output on a few images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..choices import STAND_INS
from ..comparison.layers import parts
from ..comparison.outputs import OutputTally
from ..conversion.apply import standardization
from ..data.batches import as_batches
from ..data.one_batch import images_in
from ..errors import DataError, OptionError
from ..modules.precision import at_least_float32
from ..modules.restore import evaluating, undisturbed
from ..modules.tree import module_at
from ..norms._wrappers import per_channel
from ..norms.group import divisors
from ..norms.registry import norm_named
from ..planning.plan import Plan, Step
from .balance import Spread, signs, sizes
from .matching import forward
from .moments import Args, moments_of, rows_of
from .norm_targets import first_input, repair, state_of
from .prepare import EPS
from .stand_ins import stand_ins

BUDGET = 0.01
IMAGES = 16
_STAND_INS = 32  # made at a time, since how well they fit shows badly on fewer


@torch.no_grad()
def choose_groups(
    model: nn.Module, plan: Plan, data: Any, *, budget: float = BUDGET, images: int = IMAGES, batch_size: int = 64
) -> Plan:
    """The plan, with as many groups for each GroupNorm as its layer bears on the images.

    A layer bears a number of groups if the network's output, with this layer alone as a calibrated group norm, differs
    by a relative `|out - original| / |original|` of at most `budget`; the largest such number is taken, and one group
    where none is borne. Groups have at least two channels. Numbers are tried by bisection, as if more groups never
    did less harm, each with one run on the images: about four a layer.

    model: the original network, unchanged. plan: from `normswap.plan(model, "gn", ...)`; steps to other norms, and
    those that do not start from a norm with running statistics, stay as they are. data: images without labels,
    anything `normswap.data.as_batches` takes, or "photos" or "synthetic", as in `calibrate`; the first batch, at most
    `images` of it.
    The result goes to `normswap.convert(model, using=...)`.

    Raises OptionError for a budget that is not positive, DataError for data that cannot be used, a single image, which
    does not show how images differ, or outputs that do not compare (detections).
    """
    if isinstance(budget, bool) or not 0 < budget < float("inf"):
        raise OptionError(f"budget must be a positive number, got {budget!r}")
    if isinstance(data, str) and data in STAND_INS:
        data = stand_ins(data, model, images=_STAND_INS).batches
    args = next(parts(next(iter(as_batches(data, batch_size, once=True, network=model)))[0], None, images))[0]
    if images_in(args) < 2:
        raise DataError("a single image does not show how images differ", hint="Give at least two in the first batch.")
    steps = {step.path: step for step in plan.steps if _is_open(model, step)}
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(evaluating(model))
        trial = _Trial(model, args, steps, soft=plan.meta.get("eps") == "auto")
        chosen = {path: _most(trial, step, budget) for path, step in steps.items()}
    new = tuple(_with_groups(step, chosen[step.path]) if step.path in chosen else step for step in plan.steps)
    return dataclasses.replace(plan, steps=new)


def _with_groups(step: Step, number: int) -> Step:
    options: Any = step.options
    return dataclasses.replace(step, options=dataclasses.replace(options, num_groups=number))


def _is_open(model: nn.Module, step: Step) -> bool:
    folded = norm_named(step.target).takes_groups and step.transfer.standardizes
    return folded and state_of(module_at(model, step.path)).has_statistics


def _most(trial: _Trial, step: Step, budget: float) -> int:
    """The largest number of groups within the budget."""
    numbers = [d for d in divisors(step.channels) if d == 1 or step.channels // d > 1]
    low, high = 0, len(numbers)  # numbers[low] is borne, or 1; numbers[high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if trial.drift(step, numbers[middle]) <= budget:
            low = middle
        else:
            high = middle
    return numbers[low]


class _Trial:
    """Runs the network with one of its norms as a group norm. soft: whether calibration will choose their eps."""

    def __init__(self, model: nn.Module, args: Args, steps: dict[str, Step], *, soft: bool) -> None:
        self.model, self.args, self.soft = model, args, soft
        self.spreads = {path: Spread(step.unit) for path, step in steps.items()}
        with ExitStack() as stack:
            for path in steps:
                norm = module_at(model, path)
                stack.callback(norm.register_forward_pre_hook(self._see(path), with_kwargs=True).remove)
            self.wanted = forward(model, args)

    def _see(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.spreads[path].add(rows_of(first_input(args, kwargs)), module)

        return hook

    def drift(self, step: Step, groups: int) -> float:
        """By how much the output then differs."""
        if not self.spreads[step.path].means:
            return 0.0
        with self._grouped(step, groups):
            found = forward(self.model, self.args)
        tally = OutputTally(same_layers=True)
        tally.add(self.wanted, found, None)
        total = tally.total()
        if total is None:
            raise DataError("the network's outputs do not compare, so no number of groups can be chosen by them")
        return total.relative

    @contextmanager
    def _grouped(self, step: Step, groups: int) -> Iterator[None]:
        """The norm is given what makes its output that of a group norm, so that what is fused into it stays."""
        norm = module_at(self.model, step.path)
        state = state_of(norm)
        eps = EPS if step.options.eps is None or self.soft else step.options.eps
        means, squares = self.spreads[step.path].centred()
        gamma = torch.ones_like(means[0]) if state.weight is None else state.weight.detach().to(means)
        sign = signs(means, groups)
        factor = sign * sizes(means * sign, squares, gamma, groups, eps)
        mean, scale = state.statistics[0], standardization(state, unit=step.unit)[0].double()

        def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Tensor], dict[str, Any]]:
            x = first_input(args, kwargs)
            centre, grown = (per_channel(t.to(at_least_float32(x)), x.dim()) for t in (mean, factor * scale))
            y = F.group_norm((at_least_float32(x) - centre) * grown, groups, eps=eps) / grown
            k, shift = (per_channel(t.to(y), x.dim()) for t in repair(moments_of(x), moments_of(y)))
            return ((y * k + shift).to(x.dtype),), {}

        handle = norm.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
