"""What `advise` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..calibration.fit import Fit
from ..display.overview import ReportInNotebook
from ..errors import Fix, Text
from .risks import Risk
from .rules import Rule, Situation


@dataclass(frozen=True)
class Advice(ReportInNotebook):
    """A norm for a network and a task, and what to expect of the swap.

    rule: the one that decided. options: arguments of `normswap.convert`; empty where nothing need be converted, or
    where it cannot be, which `problem` then says. calibrate: whether the swap is to be repaired, on the user's images;
    stand_in: or, without any, on those that come with normswap, "" where none fit the network. layers: how many the
    swap changes, of `norms`. risks: the worst first. drift: expected relative error of the output right after the
    swap, before any repair; None where it cannot be told. drift_by_groups: of GroupNorm, by the number of groups.
    inputs: what the noise that these come from looks like; guessed: since nobody said it. fit: how near the user's
    images are to what the network was trained on.
    """

    situation: Situation
    rule: Rule
    norms: int
    layers: int
    options: Mapping[str, Any] = field(default_factory=dict)
    calibrate: bool = False
    stand_in: str = ""
    risks: tuple[Risk, ...] = ()
    drift: float | None = None
    drift_by_groups: Mapping[int, float] = field(default_factory=dict)
    inputs: tuple[tuple[int, ...], ...] = ()
    guessed: bool = False
    fit: Fit | None = None
    problem: str = ""

    @property
    def norm(self) -> str:
        """The norm to take."""
        return self.rule.norm

    @property
    def groups(self) -> int | str | None:
        """How many groups, of a norm that has any."""
        return self.options.get("groups")

    @property
    def transfer(self) -> str:
        """What becomes of what the norms have learned: `fold`, `copy`, or `exact`, or `keep` for no swap."""
        return str(self.options.get("transfer", self._usual)) if self.options else "keep"

    @property
    def _usual(self) -> str:
        from ..norms.registry import norm_named

        return "fold" if norm_named(self.norm).per_sample else "exact"

    @property
    def fixes(self) -> tuple[Fix, ...]:
        """The options as data, for whoever writes them in another way."""
        return tuple(Fix(name, value) for name, value in self.options.items())

    @property
    def command(self) -> str:
        """The call to paste into Python; empty where there is nothing to do."""
        if not self.options:
            return ""
        what = f"model, {Text.joined(', ', map(Text, self.fixes))}"
        if not (self.calibrate or self.stand_in):
            return f"converted = normswap.convert({what})"
        data = "data" if self.calibrate else repr(self.stand_in)
        lines = [f"converted = normswap.convert({what})"]
        if self.groups is not None:
            lines = [
                f"plan = normswap.choose_groups(model, normswap.plan({what}), {data})",
                "converted = normswap.convert(model, using=plan)",
            ]
        return "\n".join([*lines, f"normswap.calibrate(converted, model, {data})"])

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What there is to say, one fact each."""
        count = f"{self.layers} of {self.norms} norms"
        found = [("norm", f"{self.norm}: {self.rule.reason}")]
        if self.rule.but:
            found.append(("but", self.rule.but))
        found.append(("source", "; ".join(map(str, self.rule.sources))))
        if self.groups is not None:
            found.append(("groups", _GROUPS["images" if self.calibrate else self.stand_in]))
        if self.options:
            found.append(("transfer", f"{self.transfer}, {count}: {_TRANSFERS[self.transfer]}"))
        if self.fit is not None:
            found.append(("data", str(self.fit)))
        if self.drift == 0:
            found.append(("drift", "none expected: in inference the outputs stay as they are"))
        elif self.drift is not None:
            size = " and ".join("x".join(map(str, shape[1:])) for shape in self.inputs)
            guess = Text(", a guess: ", Fix("example_inputs"), " says another") if self.guessed else ""
            text = f"{self.drift:.2g} expected at the output before any repair, inputs {size}"
            found.append(("drift", Text(text, guess)))
            found += [("by groups", self._by_groups)] if self.drift_by_groups else []
        return found

    @property
    def _by_groups(self) -> str:
        return ", ".join(f"{groups}: {drift:.2g}" for groups, drift in self.drift_by_groups.items())

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "situation": asdict(self.situation),
            "facts": [list(fact) for fact in self.facts],
            "norm": self.norm,
            "groups": self.groups,
            "transfer": self.transfer,
            "reason": self.rule.reason,
            "but": self.rule.but,
            "sources": [asdict(source) for source in self.rule.sources],
            "norms": self.norms,
            "layers": self.layers,
            "options": dict(self.options),
            "risks": [risk.to_dict() for risk in self.risks],
            "drift": self.drift,
            "drift_by_groups": {str(groups): drift for groups, drift in self.drift_by_groups.items()},
            "inputs": [list(shape) for shape in self.inputs],
            "guessed": self.guessed,
            "fit": None if self.fit is None else {**asdict(self.fit), "verdict": self.fit.verdict},
            "problem": self.problem,
        }

    def __str__(self) -> str:
        lines = [f"{what}: {text}" for what, text in self.facts]
        lines += [f"risk: {risk}" for risk in self.risks]
        return "\n".join([*lines, *([self.problem] if self.problem else []), *([self.command] if self.command else [])])


_GROUPS = {
    "images": "auto: as many as each layer bears on your images",
    "photos": "auto: as many as each layer bears on photographs that come with normswap; better on yours",
    "": "auto: about 16 channels a group, the best fixed choice in Wu and He 2018, table 3",
}
_TRANSFERS = {
    "fold": "the running statistics go into the layers before",
    "copy": "γ and β alone, since the running statistics say nothing",
    "exact": "the same outputs in inference",
}
