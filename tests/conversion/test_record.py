"""What a converted network remembers: its record, and the history in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from helpers import conv_bn
from torch import fx, nn

import normswap
import normswap.conversion.composite
from normswap.conversion.history import Calibrated, Distilled, Entry, FineTuned, Other
from normswap.conversion.record import attach, detach, record_of
from normswap.conversion.stabilize import Sizes
from normswap.heads.classifier import Head

# As version 0.1 writes them, and one that it does not know.
WRITTEN: dict[type[Entry], dict[str, Any]] = {
    Calibrated: {
        "action": "calibrate", "images": 24, "layers": 3, "method": "moments", "balanced": 2, "eps": 1.0,
        "drift": [0.5, None],
    },
    Distilled: {
        "action": "distil", "steps": 6, "planned": 6, "kept": 4, "train": "norms", "lr": 0.1, "seed": 0,
        "loss": [1.5, None],
    },
    FineTuned: {
        "action": "finetune", "steps": 12, "planned": 12, "train": "all", "lr": 0.01, "optimizer": "sgd",
        "global_batch": 4, "seed": 0, "figures": {"eval_loss": 1.5},
    },
    Other: {"action": "prune", "share": 0.5},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "values"), WRITTEN.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_an_entry_gives_back_the_json_it_was_read_from_in_the_same_order(
    kind: type[Entry], values: dict[str, Any]
) -> None:
    entry = Entry.from_dict(values)
    assert type(entry) is kind
    assert list(entry.to_dict().items()) == list(values.items())


@pytest.mark.parametrize("kind", [Calibrated, Distilled, FineTuned])
def test_an_entry_that_is_made_writes_what_one_that_was_read_does(kind: type[Entry]) -> None:
    values = WRITTEN[kind]
    made = kind(**{name: value for name, value in values.items() if name != "action"})
    assert list(made.to_dict().items()) == list(values.items())
    assert made == Entry.from_dict(values)


def test_an_entry_of_another_version_keeps_what_this_one_does_not_know_and_gets_nothing_new() -> None:
    values = {"action": "calibrate", "images": 8, "mood": "good"}
    entry = copy.deepcopy(Entry.from_dict(values))
    assert isinstance(entry, Calibrated)
    assert entry.images == 8
    assert entry.to_dict() == values


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.__name__)
def test_everything_but_calibration_trains(kind: type[Entry]) -> None:
    assert Entry.from_dict(WRITTEN[kind]).trains == (kind is not Calibrated)


def test_a_record_is_attached_to_the_root_and_detached() -> None:
    net = normswap.convert(conv_bn(4), "gn", groups=2)
    record = record_of(net)
    assert detach(net) is record
    assert record_of(net) is None
    assert detach(net) is None
    attach(net, record)
    assert record_of(net) is record


def test_copies_of_a_traced_network_have_its_record() -> None:
    net = fx.symbolic_trace(normswap.convert(conv_bn(4), "gn", groups=2))
    attach(net, normswap.convert(conv_bn(4), "gn", groups=2)._normswap)
    assert len(record_of(copy.deepcopy(net)).plan.steps) == 1
    detach(net)
    assert record_of(copy.deepcopy(net)) is None


def test_what_other_parts_note_in_a_record_follows_its_layers() -> None:
    part = normswap.convert(conv_bn(4), "gn", groups=2)
    part._normswap.notes = {Head: Head("2", 10), Sizes: Sizes({"1": 4.0})}
    whole = nn.Sequential(nn.Identity(), part)
    record = normswap.conversion.composite.combined_record(whole)
    assert record.notes == {Head: Head("1.2", 10), Sizes: Sizes({"1.1": 4.0})}


def test_two_parts_join_what_is_noted_of_them() -> None:
    a, b = (normswap.convert(conv_bn(4), "gn", groups=2) for _ in range(2))
    a._normswap.notes = {Sizes: Sizes({"1": 4.0})}
    b._normswap.notes = {Sizes: Sizes({"1": 0.5}), Head: Head("2", 10)}
    record = normswap.conversion.composite.combined_record(nn.ModuleDict({"a": a, "b": b}))
    assert record.notes == {Sizes: Sizes({"a.1": 4.0, "b.1": 0.5}), Head: Head("b.2", 10)}
