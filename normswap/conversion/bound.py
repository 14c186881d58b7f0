"""A plan bound to a model: each step with the modules that it is about, found, identified and read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from ..modules.gains import gain_name
from ..modules.tree import aliases, device_and_dtype, module_at
from ..norms._wrappers import NormSequence
from ..norms.registry import identify, norm_named
from ..norms.spec import NormSpec, NormState
from ..planning.plan import Plan, Step, Transfer
from ..tracing.calls import out_channels, producer_kind


@dataclass(frozen=True, eq=False)
class BoundStep:
    """One step of a plan, and the modules of one network that it is about.

    module: what is at the step's path, the norm that is to be replaced or what has replaced it. producers: the layers
    that its statistics are folded into, in the order of `step.producers`.
    """

    step: Step
    module: nn.Module
    producers: tuple[Any, ...]

    @cached_property
    def spec(self) -> NormSpec:
        """The norm's type. Raises PlanError for a module that is no norm."""
        found = identify(self.norm)
        if found is None:
            what = f"{self.step.path} is {type(self.module).__name__}, no norm"
            raise PlanError("the plan does not fit this model:", [what])
        return found

    @cached_property
    def target(self) -> NormSpec:
        """The type of the norm that takes its place."""
        return norm_named(self.step.target)

    @cached_property
    def state(self) -> NormState:
        """What the norm held when it was first asked for; its tensors are the norm's own."""
        return self.spec.read(self.norm)

    @property
    def norm(self) -> Any:
        """The norm itself, without what a conversion has put around it."""
        return inner_norm(self.module)

    @property
    def layers(self) -> Iterator[tuple[str, Any]]:
        """The layers that the statistics are folded into, with their paths."""
        return zip(self.step.producers, self.producers, strict=True)


@dataclass(frozen=True, eq=False)
class BoundPlan:
    """A plan and its steps, bound to one network, in the plan's order. device, dtype: of the network's first tensor."""

    plan: Plan
    steps: tuple[BoundStep, ...]
    device: torch.device
    dtype: torch.dtype

    def __iter__(self) -> Iterator[BoundStep]:
        return iter(self.steps)


def inner_norm(module: nn.Module) -> Any:
    """The norm inside what a conversion put at a path."""
    return module.norm if isinstance(module, NormSequence) else module


def bind(model: nn.Module, plan: Plan) -> BoundPlan:
    """A plan with the modules of the network that is to be converted.

    Raises PlanError, naming every layer, where the plan was made for another network than `model`.
    """
    names_of, (device, dtype) = aliases(model), device_and_dtype(model)
    modules = {name: module for module, names in names_of.items() for name in names}
    problems = [f"{step.path}: there is no such layer" for step in plan.steps if step.path not in modules]
    bound = tuple(
        BoundStep(step, modules[step.path], tuple(modules.get(path) for path in step.producers))
        for step in plan.steps
        if step.path in modules
    )
    uses = Counter(layer for each in bound for layer in each.producers)
    for each in bound:
        reasons = [*_misfits(each), *_producer_misfits(each, uses)]
        if {each.step.path, *each.step.aliases} != set(names_of[each.module]):
            reasons.append(f"its names are {', '.join(names_of[each.module])}")
        problems += [f"{each.step.path or '(root)'}: {reason}" for reason in reasons]
    if problems:
        hint = "Make a plan for this model: plan(model, ...)."
        raise PlanError("the plan does not fit this model:", problems, hint=hint)
    return BoundPlan(plan, bound, device, dtype)


def bound_after(model: nn.Module, plan: Plan) -> BoundPlan:
    """The plan that a network was converted by, with the modules that it has now. Raises KeyError where one is gone."""
    steps = (
        BoundStep(step, module_at(model, step.path), tuple(module_at(model, path) for path in step.producers))
        for step in plan.steps
    )
    return BoundPlan(plan, tuple(steps), *device_and_dtype(model))


def _misfits(bound: BoundStep) -> Iterator[str]:
    step, module = bound.step, bound.module
    found, target = identify(module), bound.target
    if found is None or found.name != step.source:
        yield f"it is {type(module).__name__}, the plan says {step.source}"
        return
    state = bound.state
    if state.channels != step.channels:
        yield f"it has {state.channels} channels, the plan says {step.channels}"
    if reason := step.options.misfit(step.channels):
        yield reason
    needed = step.transfer.needs_statistics or (step.transfer is Transfer.EXACT and target.needs_statistics)
    if needed and not state.has_statistics:
        yield "it has no running statistics"
    if target.needs_dims and state.dims is None and step.dims is None:
        yield f"whether {target.title} must be 1d, 2d or 3d is not known"


def _producer_misfits(bound: BoundStep, uses: Mapping[Any, int]) -> Iterator[str]:
    for path, layer in bound.layers:
        if layer is None or producer_kind(layer) is None or gain_name(layer) is None:
            yield f"there is no layer to fold into at {path}"
        elif out_channels(layer) != bound.step.channels:
            yield f"{path} has {out_channels(layer)} output channels, the norm {bound.step.channels}"
        if uses[layer] > 1:
            yield f"{path} is folded into more than once"
