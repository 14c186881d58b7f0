"""Plan a conversion: which layer becomes what, how its statistics are carried over. Pure data, JSON round-trip.

A plan names every layer it changes and every one it keeps. Layers that do not fit are errors, all of them at once.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, cast

from torch import nn

from .choices import MISSING_STATISTICS, TRANSFERS, Indivisible, MissingStatistics, Norm, Transfer
from .errors import CheckpointError, Fix, OptionError, PlanError, Text, did_you_mean
from .inventory import Inventory, Layer, inspect, positions
from .overview import Table, counted, kept_table, steps_table
from .registry import get, targets
from .rules import Rule, Rules, assigned, check_rules, rules_of, selected
from .spec import Misfit, NormSpec, Options, Request
from .values import one_of

SOFT = 1.0
"""The eps at which a norm of standardised channels follows half of a sample's own variance; `auto` stands for it."""


@dataclass(frozen=True)
class Step:
    """One layer's change.

    transfer: `fold` (statistics into `producers`), `prescale` (statistics as two fixed vectors before the norm),
    `fuse` (statistics, gamma and beta into `producers`), `affine` (what remains of a fused norm as one per-channel
    map), `exact` (the new norm computes the same in eval), `copy` (gamma and beta only) or `reset`.
    unit: whether channels quieter than the old `eps` are brought to variance 1 too, gamma making up for it.
    """

    path: str
    aliases: tuple[str, ...]
    source: str
    source_class: str
    channels: int
    target: str
    options: Options
    transfer: str
    producers: tuple[str, ...] = ()
    dims: int | None = None
    zero_init: bool = False
    note: str = ""
    unit: bool = False


@dataclass(frozen=True)
class Kept:
    """A norm layer that stays, and why."""

    path: str
    norm: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Steps in traversal order, and what is kept. `transfer` is what was asked; each step says what it gets.

    meta: JSON values; under "rules", the pattern and target of each rule and how many layers it was the first to match.
    """

    steps: tuple[Step, ...]
    kept: tuple[Kept, ...] = ()
    transfer: str = "fold"
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        changes = counted(self.steps, lambda step: f"{step.source} to {step.target}")
        return f"<Plan: {changes or 'no change'}; {len(self.kept)} kept>"

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._tables())) or "no norm layer"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self)[1:-1])}</p>" + "".join(table.to_html() for table in self._tables())

    def _tables(self) -> list[Table]:
        return [*([steps_table(self.steps)] if self.steps else []), *([kept_table(self.kept)] if self.kept else [])]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def to_json(self) -> str:
        """The plan as a JSON text that `Plan.from_json` reads back to an equal plan."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`. Raises CheckpointError for anything else."""
        try:
            steps = tuple(
                Step(
                    **{
                        **step,
                        "aliases": tuple(step["aliases"]),
                        "producers": tuple(step["producers"]),
                        "options": get(step["target"]).options(**step["options"]),
                    }
                )
                for step in values["steps"]
            )
            kept = tuple(Kept(**k) for k in values["kept"])
            return cls(steps, kept, values["transfer"], values["meta"])
        except (KeyError, TypeError, AttributeError, OptionError) as error:
            raise CheckpointError(f"this is not a normswap plan: {type(error).__name__}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`. Raises CheckpointError for anything else."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"this is not a normswap plan: {error}") from error
        return cls.from_dict(values)


def describe(step: Step) -> str:
    """A step's target with its options, as `gn(num_groups=32)`."""
    options = {k: v for k, v in asdict(step.options).items() if v is not None}
    return step.target + (f"({', '.join(f'{k}={v}' for k, v in options.items())})" if options else "")


def plan(
    model: nn.Module,
    to: Norm | str | None = None,
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
    request = Request(groups, channels_per_group, indivisible, None if soft else cast(Any, eps))
    ordered = rules_of(to, rules)
    names = {rule.target for rule in ordered} - {"keep"}
    _check_options(request, names, transfer, missing_statistics, sources)
    needs_feeds = zero_init_residual or bool(names & {"in", "fused", "bn"})
    needs_feeds |= transfer == "fold" and any(get(name).per_sample for name in names)
    needs_feeds |= example_inputs is not None
    inventory = inspect(model, example_inputs, feeds=needs_feeds)
    if not inventory.layers and not inventory.suspects:
        raise PlanError(f"{type(model).__name__} has no norm layer", [])
    guess = partial(positions, model, inventory)
    planner = _Planner(inventory, ordered, request, transfer, zero_init_residual, missing_statistics, soft, guess)
    return planner.run(selected(inventory, sources))


def _check_options(
    request: Request, names: set[str], transfer: str, missing: str, sources: Collection[str] | None
) -> None:
    one_of("transfer", transfer, TRANSFERS)
    one_of("missing_statistics", missing, MISSING_STATISTICS)
    if (request.groups is not None or request.channels_per_group is not None) and "gn" not in names:
        raise OptionError(f"groups apply to gn only, not to {', '.join(sorted(names)) or 'keep'}")
    if transfer != "fold" and "fused" in names:
        raise OptionError(Text("fused carries everything over; ", Fix("transfer", transfer), " does not go with it"))
    if transfer == "reset" and "frozen" in names:
        what = "frozen is made of the running statistics; "
        raise OptionError(Text(what, Fix("transfer", "reset"), " leaves nothing of it"))
    for name in sources or ():
        if name not in targets():
            raise OptionError(
                Text(f"unknown norm {name!r} in ", Fix("sources"), f"; known: {', '.join(targets())}"),
                hint=did_you_mean(name, targets()),
            )


@dataclass
class _Planner:
    inventory: Inventory
    rules: list[Rule]
    request: Request
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
                    steps.append(self._step(layer, get(rule.target)))
                except Misfit as misfit:
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
            raise Misfit("each group may be a single value, which erases the data: no run shows how many it holds")
        if target.elements(layer.state.channels, positions, options) < 2:
            self.degenerate = True
            raise Misfit("each group would be a single value, which erases the data")

    def _check_shape(self, layer: Layer, target: NormSpec) -> None:
        state, feed = layer.state, layer.feed
        if state.channels < 1:
            raise Misfit("it normalizes over several dimensions with one weight per element; no per-channel norm can")
        vectors = self.inventory.recorded and feed.kind == "linear" and feed.positions == 1
        if state.channel_dim != 1 and not vectors:
            raise Misfit("its channels are the last dimension, the new norm's the second")
        if layer.held_by:
            self.held = True
            raise Misfit(f"{', '.join(layer.held_by)} holds it too, outside the children, where no swap reaches it")
        if target.needs_dims and state.dims is None and feed.dims is None:
            raise Misfit(f"whether {target.title} must be 1d, 2d or 3d is not known; give example inputs")

    def _transfer(self, layer: Layer, target: NormSpec, options: Options) -> tuple[str, tuple[str, ...], str]:
        state, feed = layer.state, layer.feed
        if self.transfer == "reset":
            return "reset", (), ""
        if target.needs_statistics:
            if not state.has_statistics:
                if self.missing_statistics == "later" and target.name not in ("frozen", "fused"):
                    return "copy", (), "statistics to be estimated by calibrate"
                self.no_statistics = True
                raise Misfit(f"{target.name} needs running statistics, which {layer.spec.name} does not have")
            if target.name == "fused":
                return ("fuse", feed.producers, "") if feed.foldable else ("affine", (), feed.reason)
            return "exact", (), ""
        if not state.has_statistics:
            same = layer.spec.per_sample and _same_groups(layer, target, options)
            return ("exact" if same else "copy"), (), "" if same else "no running statistics to carry over"
        if self.transfer == "copy":
            return "copy", (), ""
        return ("fold", feed.producers, "") if feed.foldable else ("prescale", (), feed.reason)


def _same_groups(layer: Layer, target: NormSpec, options: Options) -> bool:
    """Whether a norm without running statistics and its target normalize over the same values."""
    channels = layer.state.channels
    if "ln-channel" in (layer.spec.name, target.name):
        return layer.spec.name == target.name
    groups = {"in": channels, "ln": 1}
    source = groups.get(layer.spec.name, layer.state.num_groups)
    return source == groups.get(target.name, getattr(options, "num_groups", None))


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
