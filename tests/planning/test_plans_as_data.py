"""Plans are data: they are written, read, edited and printed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import conv_bn, fingerprint
from planned import Widths

from normswap.errors import CheckpointError
from normswap.norms.spec import Options
from normswap.planning.plan import Plan, Step, Transfer
from normswap.planning.planner import plan
from normswap.planning.rules import Rule


def test_planning_changes_nothing() -> None:
    net = Widths().train()
    before = fingerprint(net)
    plan(net, to="ln", eps=1.0, zero_init_residual=True)
    plan(net, to="ln", example_inputs=torch.randn(1, 3, 16, 16))
    assert fingerprint(net) == before


@pytest.mark.parametrize(
    "options",
    [
        {"to": "gn", "groups": 2, "eps": 1.0},
        {"to": "renorm"},
        {"to": "fused"},
        {"to": "ln", "rules": {"stem": "keep", "tail": "frozen"}},
    ],
)
def test_a_plan_survives_json(options: dict[str, Any]) -> None:
    made = plan(Widths(), **options)
    again = Plan.from_json(made.to_json())
    assert again == made
    assert [type(step.options) for step in again.steps] == [type(step.options) for step in made.steps]
    json.loads(made.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "{}", '"x"', "3",
        '{"steps": [{}], "kept": [], "transfer": "fold", "meta": {}}',
        '{"steps": 3, "kept": [], "transfer": "fold", "meta": {}}',
    ],
)  # fmt: skip
def test_what_is_no_plan_is_one_clear_error(text: str) -> None:
    with pytest.raises(CheckpointError, match="not a normswap plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target", "nothing"),
        ("options", {"eps": -1.0}),
        ("options", {"num_groups": 0}),
        ("options", {"x": 1}),
        ("new", 1),
    ],
)
def test_an_edited_plan_is_one_clear_error(key: str, value: Any) -> None:
    values = plan(conv_bn(4), to="gn").to_dict()
    values["steps"][0][key] = value
    with pytest.raises(CheckpointError, match="not a normswap plan"):
        Plan.from_dict(values)


def test_a_plan_reads_as_a_table_of_what_changes_and_one_of_what_stays() -> None:
    made = plan(Widths(), to="gn", groups=2, rules={"tail": "keep"})
    rows = [line.split() for line in str(made).splitlines()]
    assert rows[1] == ["stem.bn", "1", "6", "BatchNorm2d", "gn", "(2", "groups)", "folded"]
    assert rows[-1] == ["tail.bn", "1", "bn", "rule"]


def test_rules_and_steps_are_values() -> None:
    assert Rule("a", "gn") == Rule("a", "gn")
    step = Step("a", (), "bn", "BatchNorm2d", 4, "ln", Options(), "copy")
    with pytest.raises(AttributeError):
        step.path = "b"


def test_a_transfer_is_its_text_in_json_and_in_comparisons() -> None:
    made = plan(conv_bn(4), "gn", groups=2)
    (step,) = made.to_dict()["steps"]
    assert (type(step["transfer"]), step["transfer"]) == (str, "fold")
    assert (str(made.steps[0].transfer), f"{made.steps[0].transfer}") == ("fold", "fold")
    assert Plan.from_json(made.to_json()).steps[0].transfer is Transfer.FOLD
    assert {Transfer.FOLD: 1}["fold"] == 1


@pytest.mark.parametrize(
    ("transfer", "edits", "standardizes", "keeps_outputs"),
    [
        ("fold", True, True, True),
        ("prescale", False, True, True),
        ("fuse", True, False, True),
        ("affine", False, False, True),
        ("exact", False, False, True),
        ("copy", False, False, False),
        ("reset", False, False, False),
    ],
)
def test_a_transfer_says_what_it_does(transfer: str, edits: bool, standardizes: bool, keeps_outputs: bool) -> None:
    found = Transfer(transfer)
    assert (found.edits_producer, found.standardizes, found.keeps_outputs) == (edits, standardizes, keeps_outputs)
    assert found.needs_statistics == (keeps_outputs and transfer != "exact")


def test_a_plan_with_an_unknown_transfer_is_none() -> None:
    values = plan(conv_bn(4), "gn", groups=2).to_dict()
    values["steps"][0]["transfer"] = "move"
    with pytest.raises(CheckpointError, match="not a normswap plan"):
        Plan.from_dict(values)
