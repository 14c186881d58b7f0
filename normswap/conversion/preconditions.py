"""What must hold before a plan is applied to a model. All problems are found before anything is changed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import Fix, PlanError, Text
from ..modules.precision import at_least_float32
from ..modules.tree import aliases, module_at
from ..norms.fused import scale_and_shift
from ..norms.registry import identify, norm_named
from ..norms.spec import NormState
from ..planning.plan import Plan, Step
from ..tracing.calls import out_channels, producer_kind
from .apply import read, scales_gamma, standardization
from .exact_scaling import by_output_channel, folded_bias, scaled


def check_fit(model: nn.Module, plan: Plan) -> None:
    """Raise PlanError, naming every layer, where a plan was made for another network than `model`."""
    names_of = aliases(model)
    modules = {name: module for module, names in names_of.items() for name in names}
    problems = []
    uses = Counter(modules.get(path) for step in plan.steps for path in step.producers)
    for step in plan.steps:
        if step.path not in modules:
            problems.append(f"{step.path}: there is no such layer")
            continue
        reasons = [*_misfits(modules[step.path], step), *_producer_misfits(modules, step)]
        reasons += [f"{path} is folded into more than once" for path in step.producers if uses[modules.get(path)] > 1]
        if {step.path, *step.aliases} != set(names_of[modules[step.path]]):
            reasons.append(f"its names are {', '.join(names_of[modules[step.path]])}")
        problems += [f"{step.path or '(root)'}: {reason}" for reason in reasons]
    if problems:
        hint = "Make a plan for this model: plan(model, ...)."
        raise PlanError("the plan does not fit this model:", problems, hint=hint)


def _misfits(module: nn.Module, step: Step) -> Iterator[str]:
    spec, target = identify(module), norm_named(step.target)
    if spec is None or spec.name != step.source:
        yield f"it is {type(module).__name__}, the plan says {step.source}"
        return
    state = spec.read(module)
    if state.channels != step.channels:
        yield f"it has {state.channels} channels, the plan says {step.channels}"
    if reason := step.options.misfit(step.channels):
        yield reason
    needed = step.transfer in ("fold", "prescale", "fuse", "affine")
    if (needed or (step.transfer == "exact" and target.needs_statistics)) and not state.has_statistics:
        yield "it has no running statistics"
    if state.bias is not None and not target.bias:
        yield f"it has a bias (beta), which {target.title} does not"
    if target.needs_dims and state.dims is None and step.dims is None:
        yield f"whether {target.title} must be 1d, 2d or 3d is not known"


def _producer_misfits(modules: dict[str, nn.Module], step: Step) -> Iterator[str]:
    for path in step.producers:
        layer = modules.get(path)
        if layer is None or producer_kind(layer) is None or layer._parameters.get("weight") is None:
            yield f"there is no layer to fold into at {path}"
        elif out_channels(layer) != step.channels:
            yield f"{path} has {out_channels(layer)} output channels, the norm {step.channels}"


def check_values(model: nn.Module, plan: Plan) -> None:
    """Raise PlanError, naming every layer, where the values of a model do not allow what the plan does with them."""
    check_statistics(model, plan)
    problems = [*_gamma_problems(model, plan), *_overflows(model, plan)]
    if problems:
        raise PlanError(f"{_layers(problems)} cannot be converted as asked:", problems)


def check_statistics(model: nn.Module, plan: Plan) -> None:
    """Raise PlanError, naming every layer, where running statistics are negative or not finite."""
    steps = [s for s in plan.steps if s.transfer in ("fold", "prescale", "fuse", "affine", "exact")]
    states = [(s, read(model, s)) for s in steps]
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


def never_updated(model: nn.Module) -> int:
    """How many norms have running statistics, if all of them are as they are before any training; else 0.

    That is mean 0, variance 1 and no batch counted, throughout. So it is in a network that was built just now, but
    also in one that was trained without updating them, which works in training mode alone.
    """
    states = [spec.read(module) for module in model.modules() if (spec := identify(module)) is not None]
    states = [state for state in states if state.has_statistics and not state.statistics[0].is_meta]
    for state in states:
        mean, var = state.statistics
        counted = state.num_batches_tracked is not None and bool(state.num_batches_tracked)
        if counted or bool(mean.any()) or not bool((var == 1).all()):
            return 0
    return len(states)


def affine_moved(model: nn.Module) -> bool:
    """Whether some norm's gamma differs from channel to channel, or its beta from 0: it was trained."""
    states = [spec.read(module) for module in model.modules() if (spec := identify(module)) is not None]
    gammas = [s.weight.detach() for s in states if s.weight is not None and s.weight.numel() and not s.weight.is_meta]
    betas = [s.bias.detach() for s in states if s.bias is not None and not s.bias.is_meta]
    return any(bool((g != g[0]).any()) for g in gammas) or any(bool(b.any()) for b in betas)


def needs_statistics(plan: Plan) -> bool:
    """Whether some step standardises a layer's channels by its running statistics."""
    return any(step.transfer in ("fold", "prescale") for step in plan.steps)


def _layers(problems: list[str]) -> str:
    return f"{len(problems)} layer{'s' * (len(problems) != 1)}"


def _all_sound(means: list[Tensor], variances: list[Tensor]) -> bool:
    """One pass over all layers at once; the slow search for the culprit is left to when there may be one."""
    mean, var = (torch.cat([at_least_float32(t).view(-1).cpu() for t in tensors]) for tensors in (means, variances))
    return bool(torch.isfinite(mean).all() & torch.isfinite(var).all() & (var > 0).all())


def _gamma_problems(model: nn.Module, plan: Plan) -> Iterator[str]:
    """Gammas that `eps` or `zero_init_residual` would change, and that are not this layer's alone to change."""
    steps = [step for step in plan.steps if scales_gamma(step) or step.zero_init]
    if not steps:
        return
    owners: dict[int, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].add(module)
    changed = {module_at(model, step.path): (scales_gamma(step), step.zero_init) for step in steps}
    for step in steps:
        norm = module_at(model, step.path)
        what = "zero_init_residual" if step.zero_init else "eps"
        if parametrize.is_parametrized(norm, "weight"):
            yield f"{step.path}: its gamma is parametrized, so {what} cannot change it"
        elif any(changed.get(m) != changed[norm] for m in owners.get(id(norm._parameters.get("weight")), ())):
            yield f"{step.path}: its gamma is tied to another layer's, so {what} cannot change it"


def _overflows(model: nn.Module, plan: Plan) -> Iterator[str]:
    for step in plan.steps:
        for path in step.producers if step.transfer in ("fold", "fuse") else ():
            layer: Any = module_at(model, path)
            half = layer.weight.dtype is torch.float16 and not layer.weight.is_meta
            if half and _overflows_float16(layer, read(model, step), step):
                yield f"{step.path}: folded into {path}, it leaves the range of float16; convert in float32 first"


def _overflows_float16(layer: Any, state: NormState, step: Step) -> bool:
    fold = step.transfer == "fold"
    scale, shift = standardization(state, unit=step.unit) if fold else scale_and_shift(state)
    weight = layer.weight.detach()
    bias = folded_bias(layer.bias, scale, shift, weight.dtype)
    folded = scaled(weight, by_output_channel(layer, scale))
    return bool((weight.isfinite() & ~folded.isfinite()).any() | ~bias.isfinite().all())
