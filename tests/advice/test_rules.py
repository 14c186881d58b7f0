"""Which norm for which situation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from normswap.advice.rules import RULES, Situation, decision_table, rule_for
from normswap.errors import OptionError
from normswap.norms.registry import targets

PAGE = Path(__file__).parents[2] / "docs" / "which-norm.md"


@pytest.mark.parametrize(
    ("situation", "norm"),
    [
        ({"batch_size": 32}, "bn"),
        ({"batch_size": 8}, "gn"),
        ({}, "gn"),
        ({"resembles": True}, "frozen"),
        ({"resembles": False}, "gn"),
        ({"task": "detection", "batch_size": 32, "resembles": True}, "frozen"),
        ({"task": "segmentation", "batch_size": 1}, "gn"),
        ({"task": "style", "batch_size": 32}, "in"),
        ({"task": "sequence"}, "ln"),
        ({"task": "sequence", "steps": True}, "ln-channel"),
        ({"steps": True}, "gn"),
        ({"private": True, "batch_size": 32, "resembles": True}, "gn"),
        ({"federated": True, "batch_size": 32}, "gn"),
        ({"ema": True, "batch_size": 32}, "gn"),
        ({"inference": True}, "fused"),
    ],
)
def test_a_situation_leads_to_a_norm(situation: dict[str, Any], norm: str) -> None:
    assert rule_for(Situation(**situation)).norm == norm


def test_every_rule_names_a_norm_a_reason_and_a_source() -> None:
    for rule in RULES:
        assert rule.norm in targets()
        assert rule.reason
        assert "\n" not in rule.reason
        assert rule.sources


def test_every_rule_decides_in_some_situation() -> None:
    flags = ("private", "federated", "ema")
    tried = [Situation(inference=True), Situation(batch_size=64), Situation(resembles=True), Situation()]
    tried += [Situation(task=task) for task in ("style", "sequence")] + [Situation(**{flag: True}) for flag in flags]
    tried.append(Situation(task="sequence", steps=True))
    assert {rule_for(situation).when for situation in tried} == {rule.when for rule in RULES}


def test_the_federated_rule_names_the_evidence_against_it() -> None:
    rule = rule_for(Situation(federated=True))
    assert "FixBN" in rule.but
    assert any("2303.06530" in str(source) for source in rule.sources)


def test_the_page_holds_the_table_of_the_rules() -> None:
    assert decision_table() in PAGE.read_text("utf-8")


@pytest.mark.parametrize(
    ("situation", "what"),
    [
        ({"task": "clasification"}, "Did you mean classification"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"inference": True, "ema": True}, "inference is for a network that is not trained; ema is of one"),
        ({"inference": True, "private": True, "batch_size": 2}, "private and batch_size are of one"),
    ],
)
def test_a_situation_that_cannot_be_is_told(situation: dict[str, Any], what: str) -> None:
    with pytest.raises(OptionError) as error:
        Situation(**situation)
    assert what in str(error.value)
