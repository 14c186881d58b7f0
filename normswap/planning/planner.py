"""Make a plan. Layers that do not fit are errors, all of them at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from torch import nn

from ..arguments import one_of
from ..choices import MISSING_STATISTICS, TRANSFERS, Indivisible, MissingStatistics, Transfer
from ..errors import Fix, OptionError, PlanError, Text
from ..inspection.inventory import Inventory, Layer, inspect, positions
from ..norms.registry import norm_named, specs, suggestion, targets
from ..norms.spec import DoesNotFit, NormRequest, NormSpec, Options
from .plan import SOFT, Kept, Plan, Step
from .rules import Rule, Rules, assigned, check_rules, rules_of, selected


def plan(
    model: nn.Module,
    to: str | None = None,
    *,
    groups: int | str | None = None,
    channels_per_group: int | None = None,
    indivisible: Indivisible = "error",
    transfer: Transfer = "fold",
    eps: float | str | None = None,
    rules: Rules | None = None,
    sources: Collection[str] | None = None,
    example_inputs: Any = None,
    zero_init_residual: bool = False,
    missing_statistics: MissingStatistics = "error",
) -> Plan:
    """Plan how to replace the norm layers of `model`. Changes nothing.

    to: the target of every layer no rule matches. rules: ordered `pattern -> norm or "keep"`, the first match wins;
    a pattern is a path with shell wildcards or ranges as `layer3.{0..35}.bn1`, or the part of the network, as
    `role:backbone`, `role:fpn`, `role:head`.
    groups: number of groups for `gn`, or "auto" (default), which aims at 16 channels a group; channels_per_group
    excludes it. indivisible: "error", or "nearest" for the largest divisor that does not exceed what was asked.
    transfer: "fold" carries the running statistics over, "copy" only gamma and beta, "reset" nothing.
    eps: of the new norms; under "fold", gamma is scaled by sqrt(1 + eps) so that a channel of unit variance passes
    unchanged. "auto" takes 1 where the norm's input is standardised so, and the norm's usual value elsewhere.
    sources: names of the norm types to convert; by default those with batch statistics, or, in a network without any,
    every channels-first norm. zero_init_residual: gamma 0 in the last norm of each residual branch.
    missing_statistics: "error", or "later" when `calibrate` will estimate what a BN target needs.

    Raises OptionError for options that make no sense, PlanError listing every layer that cannot be converted.
    """
    soft = eps == "auto"
    request = NormRequest(groups, channels_per_group, indivisible, None if soft else cast(Any, eps))
    ordered = rules_of(to, rules)
    wanted = [norm_named(name) for name in sorted({rule.target for rule in ordered} - {"keep"})]
    _check_options(request, wanted, transfer, missing_statistics, sources)
    needs_feeds = zero_init_residual or any(spec.needs_dims or spec.fuses for spec in wanted)
    needs_feeds |= transfer == "fold" and any(spec.per_sample for spec in wanted)
    needs_feeds |= example_inputs is not None
    inventory = inspect(model, example_inputs, feeds=needs_feeds)
    if not inventory.layers and not inventory.suspects:
        raise PlanError(f"{type(model).__name__} has no norm layer", [])
    guess = partial(positions, model, inventory)
    planner = _Planner(inventory, ordered, request, transfer, zero_init_residual, missing_statistics, soft, guess)
    return planner.run(selected(inventory, sources))


def _check_options(
    request: NormRequest, wanted: Sequence[NormSpec], transfer: str, missing: str, sources: Collection[str] | None
) -> None:
    one_of("transfer", transfer, TRANSFERS)
    one_of("missing_statistics", missing, MISSING_STATISTICS)
    grouped = request.groups is not None or request.channels_per_group is not None
    if grouped and not any(spec.takes_groups for spec in wanted):
        takers = " and ".join(spec.name for spec in specs() if spec.takes_groups)
        raise OptionError(f"groups apply to {takers} only, not to {', '.join(s.name for s in wanted) or 'keep'}")
    for spec in wanted:
        if transfer != "fold" and spec.fuses:
            given = Fix("transfer", transfer)
            raise OptionError(Text(f"{spec.name} carries everything over; ", given, " does not go with it"))
        if transfer == "reset" and spec.fixed:
            what = f"{spec.name} is made of the running statistics; "
            raise OptionError(Text(what, Fix("transfer", "reset"), " leaves nothing of it"))
    for name in sources or ():
        if name not in targets():
            raise OptionError(
                Text(f"unknown norm {name!r} in ", Fix("sources"), f"; known: {', '.join(targets())}"),
                hint=suggestion(name),
            )


_PLACES = {1: "second", -1: "last"}


@dataclass
class _Planner:
    inventory: Inventory
    rules: list[Rule]
    request: NormRequest
    transfer: str
    zero_init: bool
    missing_statistics: str
    soft: bool
    guess_positions: Callable[[], Mapping[str, int]]
    problems: list[str] = field(default_factory=list)
    indivisible: bool = False
    degenerate: bool = False
    unshown: bool = False
    positions: Mapping[str, int] | None = None
    no_statistics: bool = False
    held: bool = False

    def run(self, among: set[str]) -> Plan:
        """among: paths of the layers that rules apply to."""
        steps: list[Step] = []
        kept: list[Kept] = []
        chosen = assigned(self.inventory, self.rules, among)
        for layer in self.inventory.layers:
            rule = chosen.get(layer.path)
            if rule is None or rule.target == "keep":
                why = "not among the norms to convert" if layer.path not in among else "rule" if rule else "no rule"
                kept.append(Kept(layer.path, layer.spec.name, why))
            else:
                try:
                    steps.append(self._step(layer, norm_named(rule.target)))
                except DoesNotFit as misfit:
                    self.indivisible |= misfit.divisibility
                    self.problems.append(f"{_name(layer.path)} ({layer.class_name}): {misfit}")
        for suspect in self.inventory.suspects:
            rule = chosen.get(suspect.path)
            if rule is not None and rule.target == "keep":
                kept.append(Kept(suspect.path, suspect.class_name, "rule"))
            else:
                self.problems.append(f"{_name(suspect.path)} ({suspect.class_name}): {suspect.reason}")
        check_rules(self.inventory, self.rules, among)
        if self.problems:
            raise _problem_error(self, among)
        if not among:
            raise PlanError("no layer to convert", [f"{_name(x.path)}: {x.spec.name}" for x in self.inventory.layers])
        used = Counter(chosen.values())
        matched = [{"pattern": r.pattern, "target": r.target, "layers": used[r]} for r in self.rules]
        return Plan(tuple(steps), tuple(kept), self.transfer, {"rules": matched})

    def _step(self, layer: Layer, target: NormSpec) -> Step:
        state, feed = layer.state, layer.feed
        self._check_shape(layer, target)
        options = target.fit(state, self.request)
        if target.per_sample and options.eps is None and not state.has_statistics and layer.spec.per_sample:
            options = replace(options, eps=state.eps)  # so that gn(1) = ln stays exact
        self._check_elements(layer, target, options)
        transfer, producers, note = self._transfer(layer, target, options)
        if self.soft and target.per_sample and transfer in ("fold", "prescale"):
            options = replace(options, eps=SOFT)
        return Step(
            layer.path,
            layer.aliases,
            layer.spec.name,
            layer.class_name,
            state.channels,
            target.name,
            options,
            transfer,
            producers,
            state.dims or feed.dims,
            self.zero_init and feed.last_of_branch,
            note,
            unit=transfer in ("fold", "prescale") and layer.free_gamma,
        )

    def _check_elements(self, layer: Layer, target: NormSpec, options: Options) -> None:
        """Refuse groups of a single value, and what may be one for all that is known."""
        if target.elements is None or target.elements(layer.state.channels, 1, options) > 1:
            return
        positions = layer.feed.positions
        if positions is None:
            if self.positions is None:
                self.positions = self.guess_positions()
            positions = self.positions.get(layer.path)
        if positions is None:
            self.degenerate = self.unshown = True
            raise DoesNotFit("each group may be a single value, which erases the data: no run shows how many it holds")
        if target.elements(layer.state.channels, positions, options) < 2:
            self.degenerate = True
            raise DoesNotFit("each group would be a single value, which erases the data")

    def _check_shape(self, layer: Layer, target: NormSpec) -> None:
        state, feed = layer.state, layer.feed
        if state.channels < 1:
            raise DoesNotFit(
                "it normalizes over several dimensions with one weight per element; no per-channel norm can"
            )
        vectors = self.inventory.recorded and feed.kind == "linear" and feed.positions == 1
        if state.channel_dim != target.channel_dim and not vectors:
            mine, new = _PLACES[state.channel_dim], _PLACES[target.channel_dim]
            raise DoesNotFit(f"its channels are the {mine} dimension, the new norm's the {new}")
        if state.bias is not None and not target.bias:
            raise DoesNotFit(f"it has a bias (beta), which {target.title} does not")
        if layer.held_by:
            self.held = True
            raise DoesNotFit(f"{', '.join(layer.held_by)} holds it too, outside the children, where no swap reaches it")
        if target.needs_dims and state.dims is None and feed.dims is None:
            raise DoesNotFit(f"whether {target.title} must be 1d, 2d or 3d is not known; give example inputs")

    def _transfer(self, layer: Layer, target: NormSpec, options: Options) -> tuple[str, tuple[str, ...], str]:
        state, feed = layer.state, layer.feed
        if self.transfer == "reset":
            return "reset", (), ""
        if target.needs_statistics:
            if not state.has_statistics:
                if self.missing_statistics == "later" and target.updates_statistics:
                    return "copy", (), "statistics to be estimated by calibrate"
                self.no_statistics = True
                raise DoesNotFit(f"{target.name} needs running statistics, which {layer.spec.name} does not have")
            if target.fuses:
                return ("fuse", feed.producers, "") if feed.foldable else ("affine", (), feed.reason)
            return "exact", (), ""
        if not state.has_statistics:
            if not (layer.spec.per_sample and _same_groups(layer, target, options)):
                return "copy", (), "no running statistics to carry over"
            same = options.eps == state.eps
            return ("exact" if same else "copy"), (), "" if same else "another eps than it had"
        if self.transfer == "copy":
            return "copy", (), ""
        return ("fold", feed.producers, "") if feed.foldable else ("prescale", (), feed.reason)


def _same_groups(layer: Layer, target: NormSpec, options: Options) -> bool:
    """Whether a norm without running statistics and its target normalize over the same values."""
    if layer.spec.groups is None or target.groups is None:
        return layer.spec is target
    return layer.spec.groups(layer.state, None) == target.groups(layer.state, options)


def _name(path: str) -> str:
    return path or "(root)"


def _problem_error(planner: _Planner, among: set[str]) -> PlanError:
    total = len(planner.problems)
    summary = f"{total} layer{'s' * (total != 1)} cannot be converted as asked:"
    hints: list[str] = []
    if planner.indivisible:
        hints.append(Text(Fix("indivisible", "nearest"), " takes the largest divisor below what you asked for."))
        channels = [x.state.channels for x in planner.inventory.layers if x.path in among]
        size = next((s for s in (16, 8, 4) if all(c % s == 0 for c in channels)), None)
        fix = Fix("channels_per_group", size) if size else Fix("groups", "auto")
        hints.append(Text(fix, " fits every layer."))
    if planner.unshown:
        hints.append(Text("Example inputs show how large a layer's maps are: ", Fix("example_inputs"), "."))
    if planner.degenerate:
        frozen = Fix("rules", {"PATH": "frozen"})
        hints.append(Text("A rule keeps such a layer or gives it another norm: ", frozen, ", or fewer groups."))
    if planner.no_statistics:
        hints.append("calibrate estimates them from images: `normswap convert ... --calibrate FOLDER`.")
    if planner.inventory.suspects or planner.held:
        hints.append(Text("To leave a layer as it is: ", Fix("rules", {"PATH": "keep"}), "."))
    return PlanError(summary, planner.problems, hint=Text.joined("\n", hints) or None, indivisible=planner.indivisible)
