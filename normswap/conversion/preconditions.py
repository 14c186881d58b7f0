"""What must hold before a plan is applied to a model. All problems are found before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import Fix, PlanError, Text
from ..modules.gains import gain_of
from ..modules.precision import at_least_float32
from ..norms.spec import NormState
from .apply import folded_in, scales_gamma
from .bound import BoundPlan
from .exact_scaling import by_output_channel, folded_bias, scaled


def check_values(model: nn.Module, bound: BoundPlan) -> None:
    """Raise PlanError, naming every layer, where the values of a model do not allow what the plan does with them."""
    check_statistics(bound)
    problems = [*_gamma_problems(model, bound), *_overflows(bound)]
    if problems:
        raise PlanError(f"{_layers(problems)} cannot be converted as asked:", problems)


def check_statistics(bound: BoundPlan) -> None:
    """Raise PlanError, naming every layer, where running statistics are negative or not finite."""
    states = [(b.step, b.state) for b in bound if b.step.transfer.keeps_outputs]
    known = [(s, *x.statistics, x.eps) for s, x in states if x.has_statistics and not x.statistics[0].is_meta]
    if not known or _all_sound([mean for _, mean, _, _ in known], [var for _, _, var, _ in known]):
        return
    problems = []
    for step, mean, var, eps in known:
        if not bool(torch.isfinite(mean).all() & torch.isfinite(var).all()):
            problems.append(f"{step.path}: running statistics hold NaN or Inf")
        elif bool((var < 0).any()):
            problems.append(f"{step.path}: running_var is negative ({float(var.min()):.3g})")
        elif bool((var + eps <= 0).any()):
            problems.append(f"{step.path}: running_var + eps is 0 in some channel")
    if problems:
        raise PlanError(
            f"{_layers(problems)} with running statistics that no network can have:",
            problems,
            hint=Text(
                "The weights are damaged. ",
                Fix("transfer", "copy"),
                " leaves the statistics out; ",
                Fix("rules", {"PATH": "keep"}),
                " leaves a layer as it is.",
            ),
        )


def never_updated(states: list[NormState]) -> int:
    """How many norms have running statistics, if all of them are as they are before any training; else 0.

    That is mean 0, variance 1 and no batch counted, throughout. So it is in a network that was built just now, but
    also in one that was trained without updating them, which works in training mode alone. states: of all its norms.
    """
    states = [state for state in states if state.has_statistics and not state.statistics[0].is_meta]
    for state in states:
        mean, var = state.statistics
        counted = state.num_batches_tracked is not None and bool(state.num_batches_tracked)
        if counted or bool(mean.any()) or not bool((var == 1).all()):
            return 0
    return len(states)


def affine_moved(states: list[NormState]) -> bool:
    """Whether some norm's gamma differs from channel to channel, or its beta from 0: it was trained."""
    gammas = [s.weight.detach() for s in states if s.weight is not None and s.weight.numel() and not s.weight.is_meta]
    betas = [s.bias.detach() for s in states if s.bias is not None and not s.bias.is_meta]
    return any(bool((g != g[0]).any()) for g in gammas) or any(bool(b.any()) for b in betas)


def _layers(problems: list[str]) -> str:
    return f"{len(problems)} layer{'s' * (len(problems) != 1)}"


def _all_sound(means: list[Tensor], variances: list[Tensor]) -> bool:
    """One pass over all layers at once; the slow search for the culprit is left to when there may be one."""
    mean, var = (torch.cat([at_least_float32(t).view(-1).cpu() for t in tensors]) for tensors in (means, variances))
    return bool(torch.isfinite(mean).all() & torch.isfinite(var).all() & (var > 0).all())


def _gamma_problems(model: nn.Module, bound: BoundPlan) -> Iterator[str]:
    """Gammas that `eps` or `zero_init_residual` would change, and that are not this layer's alone to change."""
    asked = [(b.step, b.module) for b in bound if scales_gamma(b.step) or b.step.zero_init]
    if not asked:
        return
    owners: dict[int, set[nn.Module]] = defaultdict(set)
    for module in nn.Module.modules(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].add(module)
    changed = {norm: (scales_gamma(step), step.zero_init) for step, norm in asked}
    for step, norm in asked:
        what = "zero_init_residual" if step.zero_init else "eps"
        if parametrize.is_parametrized(norm, "weight"):
            yield f"{step.path}: its gamma is parametrized, so {what} cannot change it"
        elif any(changed.get(m) != changed[norm] for m in owners.get(id(norm._parameters.get("weight")), ())):
            yield f"{step.path}: its gamma is tied to another layer's, so {what} cannot change it"


def _overflows(bound: BoundPlan) -> Iterator[str]:
    for each in bound:
        for path, layer in each.layers:
            gain = gain_of(layer)
            half = gain.dtype is torch.float16 and not gain.is_meta
            if half and _overflows_float16(layer, *folded_in(each)):
                yield f"{each.step.path}: folded into {path}, it leaves the range of float16; convert in float32 first"


def _overflows_float16(layer: Any, scale: Tensor, shift: Tensor) -> bool:
    weight = gain_of(layer).detach()
    bias = folded_bias(layer.bias, scale, shift, weight.dtype)
    folded = scaled(weight, by_output_channel(layer, scale))
    return bool((weight.isfinite() & ~folded.isfinite()).any() | ~bias.isfinite().all())
