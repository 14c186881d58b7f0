"""What a caller asks of a plan, as one value."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from ..arguments import one_of
from ..errors import Fix, OptionError, Text, did_you_mean
from ..norms.registry import norm_named, targets
from ..norms.spec import NormRequest
from .plan import TRANSFERS
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

    @property
    def names(self) -> set[str]:
        """The norms that are asked for."""
        return {rule.target for rule in self.ordered} - {"keep"}

    @property
    def needs_feeds(self) -> bool:
        """Whether it matters what feeds the norms."""
        names = self.names
        folds = self.transfer == "fold" and any(norm_named(name).per_sample for name in names)
        asked = self.zero_init_residual or self.example_inputs is not None
        return asked or folds or bool(names & {"in", "fused", "bn"})

    @property
    def say_what(self) -> bool:
        """Whether they say anything of what is to be planned, which a ready plan would contradict."""
        wanted = (self.to, self.groups, self.channels_per_group, self.eps, self.rules, self.sources)
        return any(value is not None for value in wanted) or self.transfer != "fold" or self.zero_init_residual

    def check(self) -> None:
        """Raise OptionError for what makes no sense."""
        request, names = self.request, self.names
        one_of("transfer", self.transfer, TRANSFERS)
        one_of("missing_statistics", self.missing_statistics, ("error", "later"))
        if (request.groups is not None or request.channels_per_group is not None) and "gn" not in names:
            raise OptionError(f"groups apply to gn only, not to {', '.join(sorted(names)) or 'keep'}")
        if self.transfer != "fold" and "fused" in names:
            what = "fused carries everything over; "
            raise OptionError(Text(what, Fix("transfer", self.transfer), " does not go with it"))
        if self.transfer == "reset" and "frozen" in names:
            what = "frozen is made of the running statistics; "
            raise OptionError(Text(what, Fix("transfer", "reset"), " leaves nothing of it"))
        for name in self.sources or ():
            if name not in targets():
                raise OptionError(
                    Text(f"unknown norm {name!r} in ", Fix("sources"), f"; known: {', '.join(targets())}"),
                    hint=did_you_mean(name, targets()),
                )
