"""What a caller asks of a plan, as one value."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from ..arguments import one_of
from ..choices import MISSING_STATISTICS, TRANSFERS
from ..errors import Fix, OptionError, Text
from ..norms.registry import norm_named, specs, suggestion, targets
from ..norms.spec import NormRequest, NormSpec
from .rules import Rule, Rules, rules_of


@dataclass(frozen=True, eq=False)
class PlanOptions:
    """The arguments of `plan`, which explains them; `check` says whether they make sense together."""

    to: str | None = None
    groups: int | str | None = None
    channels_per_group: int | None = None
    indivisible: str = "error"
    transfer: str = "fold"
    eps: float | str | None = None
    rules: Rules | None = None
    sources: Collection[str] | None = None
    example_inputs: Any = None
    zero_init_residual: bool = False
    missing_statistics: str = "error"
    fold_affine: bool = False

    @cached_property
    def request(self) -> NormRequest:
        """What every layer is asked. Raises OptionError for numbers that cannot be."""
        eps = None if self.soft else cast(Any, self.eps)
        return NormRequest(self.groups, self.channels_per_group, self.indivisible, eps)

    @cached_property
    def ordered(self) -> list[Rule]:
        """The rules, and `to` for all the rest. Raises OptionError where there are none."""
        return rules_of(self.to, self.rules)

    @property
    def soft(self) -> bool:
        """Whether eps is to be chosen by what a norm's input is."""
        return self.eps == "auto"

    @cached_property
    def wanted(self) -> list[NormSpec]:
        """The types of the norms that are asked for, by name."""
        return [norm_named(name) for name in sorted({rule.target for rule in self.ordered} - {"keep"})]

    @property
    def needs_feeds(self) -> bool:
        """Whether it matters what feeds the norms."""
        folds = self.transfer == "fold" and any(spec.per_sample for spec in self.wanted)
        asked = self.zero_init_residual or self.example_inputs is not None
        fits = self.missing_statistics == "later" and any(spec.needs_statistics for spec in self.wanted)
        return asked or folds or fits or any(spec.needs_dims or spec.fuses for spec in self.wanted)

    @property
    def say_what(self) -> bool:
        """Whether they say anything of what is to be planned, which a ready plan would contradict."""
        wanted = (self.to, self.groups, self.channels_per_group, self.eps, self.rules, self.sources)
        return any(value is not None for value in wanted) or self.transfer != "fold" or self.zero_init_residual

    def check(self) -> None:
        """Raise OptionError for what makes no sense."""
        request, wanted = self.request, self.wanted
        one_of("transfer", self.transfer, TRANSFERS)
        one_of("missing_statistics", self.missing_statistics, MISSING_STATISTICS)
        grouped = request.groups is not None or request.channels_per_group is not None
        if grouped and not any(spec.takes_groups for spec in wanted):
            takers = " and ".join(spec.name for spec in specs() if spec.takes_groups)
            raise OptionError(f"groups apply to {takers} only, not to {', '.join(s.name for s in wanted) or 'keep'}")
        for spec in wanted:
            self._check_transfer(spec)
        for name in self.sources or ():
            if name not in targets():
                raise OptionError(
                    Text(f"unknown norm {name!r} in ", Fix("sources"), f"; known: {', '.join(targets())}"),
                    hint=suggestion(name),
                )

    def _check_transfer(self, spec: NormSpec) -> None:
        if self.transfer != "fold" and spec.fuses:
            given = Fix("transfer", self.transfer)
            raise OptionError(Text(f"{spec.name} carries everything over; ", given, " does not go with it"))
        if self.transfer == "reset" and spec.fixed:
            what = f"{spec.name} is made of the running statistics; "
            raise OptionError(Text(what, Fix("transfer", "reset"), " leaves nothing of it"))
