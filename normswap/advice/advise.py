"""`normswap.advise`: a network and what it is for -> a norm, its reasons, its risks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..calibration.fit import Fit, fit, remembering
from ..calibration.images import collected
from ..calibration.stand_ins import stand_ins
from ..choices import Purpose
from ..conversion.preconditions import never_updated
from ..conversion.record import arguments_of
from ..errors import DataError, NetworkError, PlanError
from ..inspection.example_inputs import inputs_for, runs
from ..inspection.inventory import Inventory, inventory_of, positions
from ..inspection.norm_shapes import fewest, shapes_of
from ..modules.tree import module_at
from ..modules.wrappers import check_module, unwrapped
from ..norms.registry import norm_named, states_in
from ..norms.spec import NormRequest
from ..planning.options import PlanOptions
from ..planning.plan import Plan
from ..planning.planner import planned
from .drift import Swap, bare_norm, expected_drift, noise_for
from .report import Advice
from .risks import risks_of
from .rules import Rule, Situation, rule_for

IMAGES = 64
"""How many of the user's images are looked at."""
_CROPS = 26  # of photographs, to see whether they fit
GROUPS = (1, 2, 4, 8, 16, 32)


def advise(
    model: nn.Module,
    *,
    task: Purpose = "classification",
    batch_size: int | None = None,
    data: Any = None,
    private: bool = False,
    federated: bool = False,
    ema: bool = False,
    inference: bool = False,
    example_inputs: Any = None,
    preprocess: Callable[[Any], Tensor] | None = None,
) -> Advice:
    """Which norm to give a network with BatchNorm, with the reason, the risks and the call. Changes nothing.

    task: what the network is to do. batch_size: images a GPU in training, by default 2 as in `finetune`. private: with
    per-sample gradients, as for differential privacy and `vmap`; federated; ema: its weights are averaged. inference:
    it is not trained any more.
    data: images without labels, whatever `calibrate` takes; the first 64 tell whether they are like what the network
    was trained on, by its running statistics. Without any, it is seen whether the photographs that come with normswap
    can stand in.
    example_inputs: a tensor, or a tuple of the forward's arguments, of the size that the network takes; by default a
    guess. The expected drift is for that size: small maps drift further.

    The rules are those of the page "Which norm?" (`normswap.advice.rules`).

    Raises OptionError for an unknown task, a batch size below 1, and `inference` with what is about training;
    NetworkError for a network without BatchNorm; DataError for data that cannot be used.
    """
    situation = Situation(task, batch_size, private, federated, ema, inference)
    check_module(model)
    model = unwrapped(model)
    inventory = inventory_of(model, example_inputs)
    _check(model, inventory)
    unknown = bool(never_updated(states_in(model)))
    found = None if data is None or unknown else _fit(model, data, preprocess, example_inputs)
    inputs = inputs_for(model, example_inputs)
    steps = situation.task == "sequence" and _reads_steps(model, inventory, inputs)
    situation = replace(situation, resembles=None if found is None else found.suits, steps=steps)
    rule = rule_for(situation)
    held = _positions(model, inventory, inputs if example_inputs is not None else None)
    options = _options(inventory, rule, held, calibrate=data is not None, unknown=unknown)
    plan, problem = _planned(model, inventory, rule, options, example_inputs)
    noise = noise_for(model, inputs)
    noise = noise if noise is not None and runs(model, noise) else None
    drift, by_groups = _drift(model, inventory, plan, noise) if plan is not None and noise else (None, {})
    repairs = plan is not None and norm_named(rule.norm).per_sample
    alone = repairs and data is None and not unknown
    return Advice(
        situation,
        rule,
        norms=len(inventory.layers),
        layers=0 if plan is None else len(plan.steps),
        options={} if plan is None else options,
        calibrate=repairs and data is not None,
        stand_in=_stand_in(model, noise, guessed=example_inputs is None) if alone and drift is not None else "",
        risks=tuple(risks_of(model, inventory, plan, held, noise)),
        drift=drift,
        drift_by_groups=by_groups,
        inputs=tuple(tuple(x.shape) for x in noise or ()),
        guessed=example_inputs is None,
        fit=found,
        problem=problem,
    )


def _check(model: nn.Module, inventory: Inventory) -> None:
    if any(layer.spec.needs_statistics for layer in inventory.layers):
        return
    kinds = sorted({layer.spec.name for layer in inventory.layers})
    what = f"its norms are {', '.join(kinds)}" if kinds else "it has no norm layer at all"
    unknown = f", and {inventory.suspects[0].path} is not known" if inventory.suspects else ""
    ways = "`normswap norms` shows what other norms become: fixed maps, on images, or an RMSNorm of a layer norm."
    raise NetworkError(
        f"{type(model).__name__} has no BatchNorm layer to advise about: {what}{unknown}", hint=ways if kinds else None
    )


def _fit(model: nn.Module, data: Any, preprocess: Callable[[Any], Tensor] | None, example_inputs: Any) -> Fit | None:
    inputs = arguments_of(model, example_inputs=example_inputs)
    batches, _, _ = collected(model, data, IMAGES, 16, preprocess, 10, inputs)
    return fit(model, batches) if remembering(model) else None


def _reads_steps(model: nn.Module, inventory: Inventory, inputs: tuple[Any, ...] | None) -> bool:
    """Whether some norm reads `(N, C, T)`. So it is taken where no run shows a norm: of vectors, the two are one."""
    batch = {module_at(model, layer.path): layer.path for layer in inventory.layers if layer.spec.needs_statistics}
    seen = None if inputs is None else shapes_of(model, inputs, batch)
    return (
        seen is None
        or not all(path in seen for path in batch.values())
        or any(len(s) > 2 for shapes in seen.values() for s in shapes)
    )


def _positions(model: nn.Module, inventory: Inventory, inputs: tuple[Any, ...] | None) -> Mapping[str, int]:
    """How many positions each norm is given, on inputs that the caller gave, or else on a guess."""
    if inputs is None:
        return positions(model, inventory)
    seen = shapes_of(model, inputs, {module_at(model, layer.path): layer.path for layer in inventory.layers})
    return {} if seen is None else fewest(seen)


def _options(
    inventory: Inventory, rule: Rule, held: Mapping[str, int], *, calibrate: bool, unknown: bool
) -> dict[str, Any]:
    """Arguments of `convert`. Layers whose groups would be a single value are frozen instead, unknown ones kept."""
    target = norm_named(rule.norm)
    options: dict[str, Any] = {"to": rule.norm}
    if target.takes_groups:
        options["groups"] = "auto"
    if target.per_sample and unknown and not calibrate:
        options["transfer"] = "copy"
    elif target.per_sample and not calibrate:
        options["eps"] = "auto"
    rules = {suspect.path: "keep" for suspect in inventory.suspects}
    for layer in inventory.layers:
        if target.elements is None or not layer.spec.needs_statistics:
            continue
        made = target.fit(layer.state, NormRequest(groups=options.get("groups")))
        if target.elements(layer.state.channels, held.get(layer.path, 1), made) < 2:
            rules[layer.path] = "frozen" if layer.state.has_statistics else "keep"
    return {**options, **({"rules": rules} if rules else {})}


def _planned(
    model: nn.Module, inventory: Inventory, rule: Rule, options: Mapping[str, Any], example_inputs: Any
) -> tuple[Plan | None, str]:
    """The swap, and what to say where there is none."""
    batch = [layer for layer in inventory.layers if layer.spec.needs_statistics]
    if all(layer.spec.name == rule.norm for layer in batch):
        return None, f"All {len(batch)} norms are {rule.norm} already: there is nothing to convert."
    try:
        return planned(model, PlanOptions(**options, example_inputs=example_inputs)), ""
    except PlanError as error:
        return None, f"No command: {error.message}"


def _stand_in(model: nn.Module, noise: tuple[Tensor, ...] | None, *, guessed: bool) -> str:
    """What calibrates the swap where there are no images: "photos" where the network takes them for its own, or ""."""
    if noise is None or len(noise) != 1 or noise[0].dim() != 4:
        return ""
    try:
        stand_ins("photos", model, None if guessed else noise, images=_CROPS)
    except DataError:  # no images, or not those that it knows
        return ""
    return "photos"


def _drift(
    model: nn.Module, inventory: Inventory, plan: Plan, noise: tuple[Tensor, ...]
) -> tuple[float | None, dict[int, float]]:
    """Of the plan, and of GroupNorm by its number of groups; 0 where nothing in the plan depends on the sample."""
    per_sample = {step.path: step for step in plan.steps if norm_named(step.target).per_sample}
    if not per_sample:
        return 0.0, {}
    if plan.transfer == "copy" or not remembering(model):
        return None, {}
    swaps: list[Swap] = [
        {path: bare_norm(inventory[path], norm_named(step.target), step.options) for path, step in per_sample.items()}
    ]
    grouped = [path for path, step in per_sample.items() if norm_named(step.target).takes_groups]
    channels = {per_sample[path].channels for path in grouped}
    counts = [groups for groups in GROUPS if any(count % groups == 0 for count in channels)]
    for groups in counts:
        request = NormRequest(groups=groups, indivisible="nearest")
        swap: dict[str, Callable[[Tensor], Tensor]] = {}
        for path in grouped:
            step, layer = per_sample[path], inventory[path]
            target = norm_named(step.target)
            fitted = replace(target.fit(layer.state, request), eps=step.options.eps)
            swap[path] = bare_norm(layer, target, fitted)
        swaps.append(swap)
    drift, *others = expected_drift(model, swaps, noise)
    known = zip(counts, others, strict=True)
    return drift, {groups: value for groups, value in known if value is not None}
