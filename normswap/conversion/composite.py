"""Records of converted parts -> one record of the network that holds them, which can then be saved and reverted."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from itertools import chain

from torch import nn

from ..planning.plan import Plan
from ..tracing.readers import Reader
from .record import Check, Note, Record, Rename, attach, detach, record_of
from .undo_record import Undo


def adopt_part_records(model: nn.Module) -> Record | None:
    """Let a network that holds converted parts have their record, in place; the parts' own go. Returns it.

    A converted network keeps its own record; None for one that holds no converted part. Without it, a detector on a
    converted backbone could neither be saved nor reverted, and would train without `stabilized`.
    """
    record = combined_record(model)
    if record is not None and record_of(model) is None:
        for part in _parts(model).values():
            detach(part)
        attach(model, record)
    return record


def combined_record(model: nn.Module) -> Record | None:
    """The record that `lift` gives a network, which is left as it is."""
    own = record_of(model)
    if own is not None:
        return own
    records = [
        renamed_record(record, partial(_below, path))
        for path, part in _parts(model).items()
        if (record := record_of(part))
    ]
    return _joined(records) if len(records) > 1 else records[0] if records else None


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """Converted parts by their paths, but none that is within another one."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if record_of(module) is not None and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return found


def renamed_record(record: Record, rename: Rename) -> Record:
    """A record with other paths. rename: old path -> new path, None for a module that is not there any more."""
    plan, undo = record.plan, record.undo
    steps = [
        replace(
            step,
            path=path,
            aliases=_renamed(step.aliases, rename),
            producers=_renamed(step.producers, rename),
            readers=tuple(_renamed_reader(reader, rename) for reader in step.readers),
        )
        for step in plan.steps
        if (path := rename(step.path)) is not None
    ]
    kept = [replace(each, path=path) for each in plan.kept if (path := rename(each.path)) is not None]
    norms = [replace(norm, paths=paths) for norm in undo.norms if (paths := _renamed(norm.paths, rename))]
    layers = [replace(layer, path=path) for layer in undo.layers if (path := rename(layer.path)) is not None]
    orders = [replace(order, path=path) for order in undo.orders if (path := rename(order.path)) is not None]
    parameters = [replace(p, name=name) for p in undo.parameters if (name := _renamed_parameter(p.name, rename))]
    centred = [replace(c, parameter=name) for c in plan.centred if (name := _renamed_parameter(c.parameter, rename))]
    notes = {kind: new for kind, note in record.notes.items() if (new := note.renamed(rename)) is not None}
    return Record(
        replace(plan, steps=tuple(steps), kept=tuple(kept), centred=tuple(centred)),
        Undo(norms, layers, undo.complete, orders, parameters),
        record.check,
        history=list(record.history),
        previous=None if record.previous is None else renamed_record(record.previous, rename),
        notes=notes,
    )


def extracted_record(record: Record, prefix: str, there: Collection[str]) -> Record:
    """The record of what is below `prefix`, which is now a network with the modules `there`."""

    def rename(path: str) -> str | None:
        inner = path.removeprefix(prefix) if path.startswith(prefix) else None
        return inner if inner in there else None

    return renamed_record(record, rename)


def _below(part: str, path: str) -> str:
    return f"{part}.{path}" if path else part


def _renamed_parameter(name: str, rename: Rename) -> str:
    """A parameter's new name; empty where its module is not there any more."""
    owner, _, leaf = name.rpartition(".")
    path = rename(owner)
    return "" if path is None else f"{path}.{leaf}" if path else leaf


def _renamed_reader(reader: Reader, rename: Rename) -> Reader:
    weight, bias = (_renamed_parameter(name, rename) for name in (reader.weight, reader.bias))
    return replace(reader, weight=weight, bias=bias)


def _renamed(paths: tuple[str, ...], rename: Rename) -> tuple[str, ...]:
    return tuple(new for path in paths if (new := rename(path)) is not None)


def _joined(records: list[Record]) -> Record:
    """One record of several parts, of which one may have a new head.

    What was converted twice is reverted to the state in between.
    """
    plans, undos = [r.plan for r in records], [r.undo for r in records]
    steps, kept = (tuple(chain.from_iterable(each)) for each in zip(*((p.steps, p.kept) for p in plans), strict=True))
    layers = sum(r.check.layers for r in records)
    check = Check(None, reason="each part was checked by itself", layers=layers, total=len(steps))
    complete = all(u.complete for u in undos)
    folded = [x for u in undos for x in u.layers]
    norms, orders = [n for u in undos for n in u.norms], [o for u in undos for o in u.orders]
    undo = Undo(norms, folded, complete, orders, [p for u in undos for p in u.parameters])
    centred = tuple(c for p in plans for c in p.centred)
    history = [entry for r in records for entry in r.history]
    notes: dict[type, Note] = {}
    for kind, note in (pair for record in records for pair in record.notes.items()):
        notes[kind] = notes[kind].joined(note) if kind in notes else note
    plan = Plan(steps, kept, plans[0].transfer, centred=centred)
    return Record(plan, undo, check, history=history, notes=notes)
