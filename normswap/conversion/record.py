"""What a converted network remembers of its conversions; nothing else touches the attribute that holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..errors import OptionError
from ..heads.classifier import Head
from ..norms.registry import identify
from ..planning.plan import Plan
from .undo_record import Undo

ATTRIBUTE = "_normswap"
TOLERANCE = 1e-4  # of the self-check: the largest relative error
_PRESERVED = "_user_preserved_attributes"  # what torch.fx hands on to the copy of a traced network


def put_record(root: nn.Module, record: Any) -> None:
    """Keep `record` on the root of a network; None takes away what is there."""
    tables = [root.__dict__]
    if isinstance(root, fx.GraphModule):
        tables.append(root.meta.setdefault(_PRESERVED, {}))
    for table in tables:
        if record is None:
            table.pop(ATTRIBUTE, None)
        else:
            table[ATTRIBUTE] = record


@dataclass(frozen=True)
class Check:
    """The self-check's result.

    error: largest relative error `|a - b| / |a|` over the observed layers and the output, None when it was not run;
    where: the layer of that error; layers: steps the run has exercised, of `total`; reason: why it was not run.
    """

    error: float | None
    where: str = ""
    layers: int = 0
    total: int = 0
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran and stayed within 1e-4."""
        return self.error is not None and self.error <= TOLERANCE


@dataclass
class Record:
    """What a converted network knows about its conversion; kept on the root as `_normswap`.

    source: how to rebuild the original architecture (see `sources.Source.to_dict`), None when only its caller can.
    previous: of the conversion before this one, when a converted network was converted again. head: the last layer,
    where it was replaced since for another number of classes. factors: by which layers are larger for the time of a
    training (see `stabilizing`).
    """

    plan: Plan
    undo: Undo
    check: Check
    source: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    previous: Record | None = None
    head: Head | None = None
    factors: dict[str, float] = field(default_factory=dict)

    @property
    def calibrated(self) -> bool:
        """Whether `calibrate` has re-fitted the norms since the conversion."""
        return any(entry.get("action") == "calibrate" for entry in self.history)


def record_of(model: nn.Module) -> Record | None:
    """The record of a converted network, or None."""
    return model.__dict__.get(ATTRIBUTE)


def check_order(model: nn.Module, reference: nn.Module) -> None:
    """Raise OptionError where, by its record, the reference was converted from a network such as the model."""
    record = record_of(reference)
    if record is None or not record.plan.steps:
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    changed = [step for step in record.plan.steps if step.source != step.target and step.path in modules]
    now = [(norm.name if (norm := identify(modules[step.path])) else None) for step in changed]
    if changed and now == [step.source for step in changed]:
        raise OptionError(
            "the reference was converted from a network such as the model: the two are swapped",
            hint="First the converted network, which is changed; then its original, with reference=.",
        )
