"""Rules: which layers are meant, by path or by role, and the norm they are to become."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import Fix, OptionError, Text
from ..inspection.inventory import Inventory
from ..inspection.roles import counted, role_in
from ..modules.path_ranges import ROOT, matches
from ..norms.registry import norm_named, targets

Rules = Mapping[str, str] | Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Rule:
    """`pattern` -> a norm's name, or `keep`.

    pattern: shell wildcards over paths, ranges of numbers as `layer3.{0..5}.bn1`, or a module and all below it (see
    `path_ranges.matches`); or a role, as `role:head`.
    """

    pattern: str
    target: str
    role: str | None = field(init=False, default=None, repr=False, compare=False)  # that the pattern names

    def __post_init__(self) -> None:
        if not self.pattern:
            raise OptionError(f"a rule needs a pattern, such as 'layer4.*=frozen'; {ROOT!r} is the network itself")
        if self.target != "keep":
            norm_named(self.target)
        object.__setattr__(self, "role", role_in(self.pattern))
        if self.role is None:
            matches(self.pattern, "")  # its check of ranges

    def covers(self, names: Iterable[str], role: str) -> bool:
        """Whether a layer of these paths, in that part of the network, is meant."""
        return any(matches(self.pattern, name) for name in names) if self.role is None else self.role == role


def rules_of(to: str | None, rules: Rules | None) -> list[Rule]:
    """The rules in their order, and `to` for all the rest. Raises OptionError for what is none, and where none is."""
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules or ())
    if any(isinstance(pair, str) for pair in pairs):  # two letters would pass for a pattern and a norm
        raise OptionError(f"rules must be pattern -> norm, got {rules!r}")
    try:
        ordered = [Rule(pattern, target) for pattern, target in pairs]
    except (TypeError, ValueError) as error:
        raise OptionError(f"rules must be pattern -> norm, got {rules!r}") from error
    if to is not None:
        norm_named(to)
        ordered.append(Rule("*", to))
    if not ordered:
        raise OptionError(f"nothing to convert to: give `to` or `rules`; norms: {', '.join(targets())}")
    return ordered


def selected(inventory: Inventory, sources: Collection[str] | None = None) -> set[str]:
    """Paths of the layers that rules apply to; see `sources` of `plan`. Suspects come on top of them."""
    if sources is not None:
        return {x.path for x in inventory.layers if x.spec.name in sources}
    batch = {x.path for x in inventory.layers if x.spec.needs_statistics}
    if batch or inventory.suspects:
        return batch
    first = {x.path for x in inventory.layers if x.state.channel_dim == 1}
    return first or {x.path for x in inventory.layers}


def assigned(inventory: Inventory, rules: Sequence[Rule], among: Collection[str]) -> dict[str, Rule]:
    """The first rule that covers each layer, by path: of the layers `among`, and of all suspects."""
    found = {}
    for path, names, role in _candidates(inventory, among):
        rule = next((rule for rule in rules if rule.covers(names, role)), None)
        if rule is not None:
            found[path] = rule
    return found


def check_rules(inventory: Inventory, rules: Sequence[Rule], among: Collection[str]) -> None:
    """Raise OptionError for rules that cover no layer at all; those that come too late for theirs are fine."""
    candidates = _candidates(inventory, among)
    idle = [r for r in rules if not any(r.covers(names, role) for _, names, role in candidates)]
    idle = [r for r in idle if not (r.pattern == "*" and not among)]
    if not idle:
        return
    hint = Text("`normswap inspect` lists the paths; ", Fix("sources"), " selects norms other than batch norms.")
    if any(r.role for r in idle):
        there = counted(x.role for x in inventory.layers if x.path in among)
        hint = Text(f"The layers to convert are in: {there or 'none of them'}.\n", hint)
    raise OptionError(f"rule matches no layer to convert: {', '.join(repr(r.pattern) for r in idle)}", hint=hint)


def _candidates(inventory: Inventory, among: Collection[str]) -> list[tuple[str, tuple[str, ...], str]]:
    """Path, all names, and role."""
    layers = [(x.path, (x.path, *x.aliases), x.role) for x in inventory.layers if x.path in among]
    return layers + [(s.path, (s.path,), s.role) for s in inventory.suspects]
