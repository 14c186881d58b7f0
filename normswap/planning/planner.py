"""Make a plan. Layers that do not fit are errors, all of them at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from ..choices import Indivisible, MissingStatistics
from ..choices import Transfer as TransferWord
from ..errors import Fix, PlanError, Text
from ..inspection.inventory import Inventory, Layer, inventory_of, positions
from ..modules.wrappers import unwrapped
from ..norms.registry import norm_named, specs
from ..norms.spec import DoesNotFit, NormSpec, Options
from .options import PlanOptions
from .plan import SOFT, Kept, Plan, Step, Transfer
from .rules import Rules, assigned, check_rules, selected
from .sequences import Sequences
from .streams import Streams


def plan(
    model: nn.Module,
    to: str | None = None,
    *,
    groups: int | str | None = None,
    channels_per_group: int | None = None,
    indivisible: Indivisible = "error",
    transfer: TransferWord = "fold",
    eps: float | str | None = None,
    rules: Rules | None = None,
    sources: Collection[str] | None = None,
    example_inputs: Any = None,
    zero_init_residual: bool = False,
    missing_statistics: MissingStatistics = "error",
    fold_affine: bool = False,
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
    missing_statistics: "error", or "later" when `calibrate` will estimate the running statistics that a target needs
    and a source such as `gn` does not have: so a GroupNorm becomes `bn`, `frozen` or `fused`.
    fold_affine: gamma and beta of `ln` and `rms` go into the linear layers that read them, and none are left.

    Raises OptionError for options that make no sense, PlanError listing every layer that cannot be converted.
    """
    options = PlanOptions(
        to,
        groups,
        channels_per_group,
        indivisible,
        transfer,
        eps,
        rules,
        sources,
        example_inputs,
        zero_init_residual,
        missing_statistics,
        fold_affine,
    )
    return planned(unwrapped(model), options)


def planned(model: nn.Module, options: PlanOptions, inventory: Inventory | None = None) -> Plan:
    """`plan`, for a network that nothing wraps. inventory: what is in it, if that is known."""
    options.check()
    if any(cls.__module__.partition(".")[0] == "keras" for cls in type(model).__mro__):
        raise PlanError(
            f"{type(model).__name__} is a Keras model, whose layers no module swap can reach",
            [],
            hint="normswap.keras.to_group_norm(model) converts it.",
        )
    if inventory is None:
        inventory = inventory_of(model, options.example_inputs, feeds=options.needs_feeds)
    if not inventory.layers and not inventory.suspects:
        raise PlanError(f"{type(model).__name__} has no norm layer", [])
    streams, sequences = Streams(model, options.example_inputs), Sequences(model, inventory, options.example_inputs)
    planner = _Planner(inventory, options, partial(positions, model, inventory), streams, sequences)
    return planner.run(selected(inventory, options.sources))


_PLACES = {1: "second", -1: "last"}


@dataclass
class _Planner:
    inventory: Inventory
    options: PlanOptions
    guess_positions: Callable[[], Mapping[str, int]]
    streams: Streams
    sequences: Sequences
    problems: list[str] = field(default_factory=list)
    indivisible: bool = False
    degenerate: bool = False
    unshown: bool = False
    positions: Mapping[str, int] | None = None
    no_statistics: bool = False
    not_centred: bool = False
    misplaced: bool = False
    held: bool = False

    def run(self, among: set[str]) -> Plan:
        """among: paths of the layers that rules apply to."""
        steps: list[Step] = []
        kept: list[Kept] = []
        chosen = assigned(self.inventory, self.options.ordered, among)
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
        check_rules(self.inventory, self.options.ordered, among)
        if self.problems:
            raise _problem_error(self, among)
        if not among:
            raise PlanError("no layer to convert", [f"{_name(x.path)}: {x.spec.name}" for x in self.inventory.layers])
        used = Counter(chosen.values())
        matched = [{"pattern": r.pattern, "target": r.target, "layers": used[r]} for r in self.options.ordered]
        meta = {"rules": matched, **({"eps": "auto"} if self.options.soft else {})}
        moved = {s.channels for s in steps if s.transfer is Transfer.CENTRE or s.readers}
        if idle := sorted({name for channels in moved for name in self.streams.idle(channels)}):
            meta["idle"] = idle
        if counted := [step.path for step in steps if self.sequences.counts_padding(step)]:
            meta["padding"] = counted
        return Plan(tuple(steps), tuple(kept), self.options.transfer, meta, self.streams.centred())

    def _step(self, layer: Layer, target: NormSpec) -> Step:
        state, feed = layer.state, layer.feed
        self._check_shape(layer, target)
        options = target.fit(state, self.options.request)
        if target.per_sample and options.eps is None and not state.has_statistics and layer.spec.per_sample:
            options = replace(options, eps=state.eps)  # so that gn(1) = ln stays exact
        self._check_elements(layer, target, options)
        transfer, producers, note = self._transfer(layer, target, options)
        if transfer is Transfer.CENTRE:
            options = replace(options, eps=state.eps)
        readers = self.streams.readers(layer.path) if self.options.fold_affine and state.affine else ()
        if self.options.soft and target.per_sample and transfer.standardizes:
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
            self.options.zero_init_residual and feed.last_of_branch,
            note,
            unit=transfer.standardizes and layer.free_gamma,
            readers=readers,
            padded=self.sequences.tells_padding(layer.path, state.channels, target, options),
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
        if state.channel_dim != target.channel_dim and layer.spec is not target and not vectors:
            mine, new = _PLACES[state.channel_dim], _PLACES[target.channel_dim]
            self.misplaced = True
            raise DoesNotFit(f"its channels are the {mine} dimension, the new norm's the {new}")
        if layer.held_by:
            self.held = True
            raise DoesNotFit(f"{', '.join(layer.held_by)} holds it too, outside the children, where no swap reaches it")
        if target.needs_dims and state.dims is None and feed.dims is None:
            raise DoesNotFit(f"whether {target.title} must be 1d, 2d or 3d is not known; give example inputs")

    def _transfer(self, layer: Layer, target: NormSpec, options: Options) -> tuple[Transfer, tuple[str, ...], str]:
        state, feed = layer.state, layer.feed
        if self.options.transfer == Transfer.RESET:
            return Transfer.RESET, (), ""
        if target.needs_statistics:
            if not state.has_statistics:
                if self.options.missing_statistics == "later":
                    to_layer = target.fuses and feed.foldable
                    return (Transfer.ABSORB if to_layer else Transfer.ESTIMATE), feed.producers, ""
                self.no_statistics = True
                raise DoesNotFit(f"{target.name} needs running statistics, which {layer.spec.name} does not have")
            if target.fuses:
                return (Transfer.FUSE, feed.producers, "") if feed.foldable else (Transfer.AFFINE, (), feed.reason)
            return Transfer.EXACT, (), ""
        if layer.spec.name in target.centred_from and self.options.transfer == "fold":
            if options.eps not in (None, state.eps):
                raise DoesNotFit(f"with another eps than its {state.eps:g}, {target.title} computes something else")
            try:
                self.streams.centre(layer.path)
            except DoesNotFit:
                self.not_centred = True
                raise
            return Transfer.CENTRE, (), ""
        if not state.has_statistics:
            if not (layer.spec.per_sample and _same_groups(layer, target, options)):
                return Transfer.COPY, (), "no running statistics to carry over"
            same = options.eps == state.eps
            return (Transfer.EXACT, (), "") if same else (Transfer.COPY, (), "another eps than it had")
        if self.options.transfer == Transfer.COPY:
            return Transfer.COPY, (), ""
        return (Transfer.FOLD, feed.producers, "") if feed.foldable else (Transfer.PRESCALE, (), feed.reason)


def _same_groups(layer: Layer, target: NormSpec, options: Options) -> bool:
    """Whether a norm without running statistics and its target normalize over the same values."""
    if layer.spec is target:
        return layer.spec.groups is None or layer.spec.groups(layer.state, None) == layer.spec.groups(
            layer.state, options
        )
    if layer.spec.groups is None or target.groups is None:
        return False
    return layer.spec.groups(layer.state, None) == target.groups(layer.state, options)


def _name(path: str) -> str:
    return path or "(root)"


def _problem_error(planner: _Planner, among: set[str]) -> PlanError:
    total = len(planner.problems)
    summary = f"{total} layer{'s' * (total != 1)} cannot be converted as asked:"
    hint = Text.joined("\n", _ways_out(planner, among)) or None
    return PlanError(summary, planner.problems, hint=hint, indivisible=planner.indivisible)


def _ways_out(planner: _Planner, among: set[str]) -> list[str]:
    """What to do about the problems, the most particular first."""
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
        hints.append(
            "calibrate estimates them from images: `normswap convert ... --calibrate FOLDER`.\n"
            "In Python: convert(..., missing_statistics='later'), then calibrate(...)."
        )
    if planner.misplaced:
        second = ", ".join(spec.name for spec in specs() if spec.build and spec.channel_dim == 1)
        hints.append(
            f"For channels that come second there are {second}; for those that come last rms, and from ln also ln."
        )
    if planner.not_centred:
        hints.append(
            Text(
                "It is not exact there. ",
                Fix("transfer", "copy"),
                " carries gamma and beta over alone; then calibrate or distil, with images.",
            )
        )
    if planner.inventory.suspects:
        hints.append(
            "In Python, for a class that computes what a known norm does, or hands on to one: "
            "normswap.register_norm(CLASS, like='bn')."
        )
    if planner.inventory.suspects or planner.held or planner.misplaced:
        hints.append(Text("To leave a layer as it is: ", Fix("rules", {"PATH": "keep"}), "."))
    return hints
