"""A plan: which layer becomes what, how its statistics are carried over. Pure data, JSON round-trip."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from ..display.overview import Table, counted, kept_table, steps_table
from ..errors import CheckpointError, OptionError
from ..norms.registry import norm_named
from ..norms.spec import Options
from ..tracing.readers import Reader

SOFT = 1.0
"""The eps at which a norm of standardised channels follows half of a sample's own variance; `auto` stands for it."""


class Transfer(str, Enum):
    """What a step does with what a norm has learned. Each is a text too, as in a plan's JSON."""

    FOLD = "fold"
    """Statistics go into the layers before the norm."""
    PRESCALE = "prescale"
    """Statistics become two fixed vectors before the norm."""
    FUSE = "fuse"
    """Statistics, gamma and beta go into the layers before the norm."""
    AFFINE = "affine"
    """What remains of a fused norm, as one map per channel."""
    ESTIMATE = "estimate"
    """Gamma and beta are carried over; `calibrate` estimates the statistics, which the original does not have."""
    ABSORB = "absorb"
    """`calibrate` estimates the statistics; with gamma and beta they go into the layers before the norm."""
    CENTRE = "centre"
    """The mean over channels is taken out of what writes the norm's input, by which the new norm computes the same."""
    EXACT = "exact"
    """The new norm computes the same in eval mode."""
    COPY = "copy"
    """Gamma and beta alone are carried over."""
    RESET = "reset"
    """Nothing is."""

    def __str__(self) -> str:
        return self.value

    @property
    def edits_producer(self) -> bool:
        """Whether the layers before the norm are changed."""
        return self in (Transfer.FOLD, Transfer.FUSE, Transfer.ABSORB)

    @property
    def standardizes(self) -> bool:
        """Whether the running statistics standardise the new norm's input."""
        return self in (Transfer.FOLD, Transfer.PRESCALE)

    @property
    def fuses(self) -> bool:
        """Whether no norm is left, only what it computed."""
        return self in (Transfer.FUSE, Transfer.AFFINE)

    @property
    def leaves_nothing(self) -> bool:
        """Whether not even a map of each channel is left in the norm's place."""
        return self in (Transfer.FUSE, Transfer.ABSORB)

    @property
    def waits(self) -> bool:
        """Whether the new norm computes nothing sensible before `calibrate` has estimated its statistics."""
        return self in (Transfer.ESTIMATE, Transfer.ABSORB)

    @property
    def needs_statistics(self) -> bool:
        """Whether the original must have running statistics, whatever it becomes."""
        return self.standardizes or self.fuses

    @property
    def keeps_outputs(self) -> bool:
        """Whether the network's outputs are to be the same, once every new norm is bare: what a run can prove."""
        return self.needs_statistics or self in (Transfer.EXACT, Transfer.CENTRE)


@dataclass(frozen=True)
class Step:
    """One layer's change.

    transfer: what becomes of its statistics, gamma and beta; a plain text will do. unit: whether channels quieter than
    the old `eps` are brought to variance 1 too, gamma making up for it. readers: the layers behind it that gamma and
    beta go into, where they do. padded: whether the new norm leaves padded steps of sequences out of its statistics.
    """

    path: str
    aliases: tuple[str, ...]
    source: str
    source_class: str
    channels: int
    target: str
    options: Options
    transfer: Transfer
    producers: tuple[str, ...] = ()
    dims: int | None = None
    zero_init: bool = False
    note: str = ""
    unit: bool = False
    readers: tuple[Reader, ...] = ()
    padded: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "transfer", Transfer(self.transfer))


@dataclass(frozen=True)
class Centred:
    """A parameter that the mean over channels is taken out of.

    dim: its dimension of channels. scales: parameters `(C,)` that multiply the channels before they are a stream's, by
    whose product the mean is weighed.
    """

    parameter: str
    dim: int
    scales: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kept:
    """A norm layer that stays, and why."""

    path: str
    norm: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Steps in traversal order, and what is kept. `transfer` is what was asked; each step says what it gets.

    meta: JSON values; under "rules", the pattern and target of each rule and how many layers it was the first to match;
        under "eps", "auto" where it was not the caller who chose it, so that `calibrate` may choose another; under
        "padding", the paths of norms whose statistics padded steps go into; under "idle", parameters that took no part
        in the run by which streams were centred and readers found.
    centred: of all steps together, what `Transfer.CENTRE` changes.
    """

    steps: tuple[Step, ...]
    kept: tuple[Kept, ...] = ()
    transfer: str = "fold"
    meta: Mapping[str, Any] = field(default_factory=dict)
    centred: tuple[Centred, ...] = ()

    @property
    def edited(self) -> list[str]:
        """The names of the parameters that it changes beside those of norms and of layers that are folded into."""
        read = (name for step in self.steps for reader in step.readers for name in (reader.weight, reader.bias))
        return list(dict.fromkeys([*read, *(each.parameter for each in self.centred)]))

    def __repr__(self) -> str:
        changes = counted(self.steps, lambda step: f"{step.source} to {step.target}")
        return f"<Plan: {changes or 'no change'}; {len(self.kept)} kept>"

    @property
    def standardizes(self) -> bool:
        """Whether some step standardises a layer's channels by its running statistics."""
        return any(step.transfer.standardizes for step in self.steps)

    @property
    def provable(self) -> bool:
        """Whether it claims anything that a run can prove; copying or resetting gamma and beta does not."""
        return any(step.transfer.keeps_outputs for step in self.steps)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._tables())) or "no norm layer"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self)[1:-1])}</p>" + "".join(table.to_html() for table in self._tables())

    def _tables(self) -> list[Table]:
        return [*([steps_table(self.steps)] if self.steps else []), *([kept_table(self.kept)] if self.kept else [])]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = asdict(self)
        values["steps"] = [{**step, "transfer": str(step["transfer"])} for step in values["steps"]]
        for holder, name in ((values, "centred"), *((step, "readers") for step in values["steps"])):
            if not holder[name]:  # as before there were such
                del holder[name]
        for step in values["steps"]:
            if not step["padded"]:
                del step["padded"]
        return values

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
                        "options": norm_named(step["target"]).options(**step["options"]),
                        "readers": tuple(Reader(**reader) for reader in step.get("readers", ())),
                    }
                )
                for step in values["steps"]
            )
            kept = tuple(Kept(**k) for k in values["kept"])
            centred = tuple(Centred(**{**c, "scales": tuple(c["scales"])}) for c in values.get("centred", ()))
            return cls(steps, kept, values["transfer"], values["meta"], centred)
        except (KeyError, TypeError, AttributeError, ValueError, OptionError) as error:
            raise CheckpointError(f"this is not a normswap plan: {type(error).__name__}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`. Raises CheckpointError for anything else."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"this is not a normswap plan: {error}") from error
        return cls.from_dict(values)
