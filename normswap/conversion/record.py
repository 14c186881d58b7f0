"""What a converted network remembers of its conversions; nothing else touches the attribute that holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import fx, nn

from ..errors import NetworkError
from ..inspection.example_inputs import tensors_given
from ..modules.attributes import RECORD
from ..norms.registry import identify
from ..planning.plan import Plan
from .history import Calibrated, Entry
from .undo_record import Undo

_PRESERVED = "_user_preserved_attributes"  # what torch.fx hands on to the copy of a traced network
TOLERANCE = 1e-4  # of the self-check: the largest relative error
Rename = Callable[[str], "str | None"]


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


class Note(Protocol):
    """What another part of normswap keeps in a record: such as a new head, or the sizes that weights train at."""

    def renamed(self, rename: Rename) -> Any:
        """The same with other paths, None where nothing is left. rename: old path -> new path or None."""

    def joined(self, other: Any) -> Any:
        """One note of two parts of a network."""


N = TypeVar("N")


@dataclass
class Record:
    """What a converted network knows about its conversion.

    source: how to rebuild the original architecture (see `sources.spec.Source.to_dict`), None when only its caller can.
    previous: of the conversion before this one, when a converted network was converted again. inputs: what is known of
    the inputs, JSON values: `shape` of one of them, or the number of `arguments` of a forward that is given several;
    and how pixels in [0, 1] are prepared: `mean`, `std`, `bgr`.
    notes: of other parts of normswap, by their class.
    """

    plan: Plan
    undo: Undo
    check: Check
    source: dict[str, Any] | None = None
    history: list[Entry] = field(default_factory=list)
    previous: Record | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    notes: dict[type, Note] = field(default_factory=dict)

    @property
    def calibrated(self) -> bool:
        """Whether `calibrate` has re-fitted the norms since the conversion."""
        return any(isinstance(entry, Calibrated) for entry in self.history)

    def note(self, kind: type[N]) -> N | None:
        """The note of that class, or None."""
        found: Any = self.notes.get(kind)
        return found


def record_of(model: nn.Module) -> Record | None:
    """The record of a converted network, or None."""
    return model.__dict__.get(RECORD)


def attach(root: nn.Module, record: Record) -> None:
    """Keep `record` on the root of a network, in place of another one."""
    for table in _tables(root):
        table[RECORD] = record
    if all(callable(getattr(type(root), name, None)) for name in ("fuse", "is_fused")):
        root.__dict__["is_fused"] = fused_already


def detach(root: nn.Module) -> Record | None:
    """Take a network's record away; returns it."""
    record = record_of(root)
    for table in _tables(root):
        table.pop(RECORD, None)
    if root.__dict__.get("is_fused") is fused_already:
        del root.__dict__["is_fused"]
    return record


def arguments_of(*models: nn.Module, example_inputs: Any = None) -> int | None:
    """How many tensors forward is known to be given: by these example inputs, or those that a conversion was given."""
    records = filter(None, map(record_of, models))
    return tensors_given(example_inputs) or next((n for r in records if (n := r.inputs.get("arguments"))), None)


def fused_already(*args: Any) -> bool:
    """What a converted network of ultralytics answers where its code asks whether batch norms are left to fuse.

    Its `fuse` reads `running_mean` of every norm, and there is nothing to fuse any more.
    """
    return True


def _tables(root: nn.Module) -> list[dict[str, Any]]:
    tables = [root.__dict__]
    if isinstance(root, fx.GraphModule):
        tables.append(root.meta.setdefault(_PRESERVED, {}))
    return tables


def check_order(model: nn.Module, reference: nn.Module) -> None:
    """Raise OptionError where, by its record, the reference was converted from a network such as the model."""
    record = record_of(reference)
    if record is None or not record.plan.steps:
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    changed = [step for step in record.plan.steps if step.source != step.target and step.path in modules]
    now = [(norm.name if (norm := identify(modules[step.path])) else None) for step in changed]
    if changed and now == [step.source for step in changed]:
        raise NetworkError(
            "the reference was converted from a network such as the model: the two are swapped",
            hint="First the converted network, which is changed; then its original, with reference=.",
        )
