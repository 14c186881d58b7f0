"""The parts of a network on the command line: shown by inspect, taken by rules, counted by convert."""

from __future__ import annotations

from pathlib import Path

import pytest
from ran import Cli

PARTS = """
from collections import OrderedDict
from torch import nn


def build():
    def part(channels):
        return nn.Sequential(nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8))
    return nn.Sequential(OrderedDict(backbone=part(3), neck=part(8), head=part(8)))
"""


@pytest.fixture(autouse=True)
def _parts(folder: Path) -> None:
    (folder / "parts.py").write_text(PARTS, "utf-8")


def test_inspect_shows_the_role_of_each_layer_and_counts_them(cli: Cli) -> None:
    ran = cli("inspect", "parts.py:build")
    rows = {line.split()[0]: line.split()[1] for line in ran.out.splitlines() if ".1 " in line}
    assert rows == {"backbone.1": "backbone", "neck.1": "fpn", "head.1": "head"}
    assert "Roles: backbone (1), fpn (1), head (1)" in ran.out
    assert [x["role"] for x in cli("inspect", "parts.py:build", "--json").json["layers"]] == ["backbone", "fpn", "head"]


def test_inspect_leaves_roles_out_where_there_is_one(cli: Cli) -> None:
    assert "role" not in cli("inspect", "nets.py:tiny").out.lower()


def test_convert_takes_roles_and_says_what_each_matched(cli: Cli) -> None:
    ran = cli("convert", "parts.py:build", "--rule", "role:backbone=frozen", "--rule", "role:head=gn", "--groups", 2)
    assert ran.code == 0
    assert "role:backbone matched 1 layer: frozen" in ran.out
    assert "role:head matched 1 layer: gn" in ran.out
    assert "1 bn to frozen, 1 bn to gn; 1 kept" in ran.out


def test_inspect_shows_what_rules_match_before_anything_is_converted(cli: Cli) -> None:
    rules = ["--rule", "role:backbone=frozen", "--rule", "head=keep", "--rule", "role:head=gn"]
    ran = cli("inspect", "parts.py:build", *rules)
    assert ran.code == 0
    rows = {line.split()[0]: line.split()[1:3] for line in ran.out.splitlines() if ".1 " in line}
    assert rows == {"backbone.1": ["backbone", "frozen"], "neck.1": ["fpn", "1"], "head.1": ["head", "keep"]}
    assert "role:backbone=frozen matches 1 layer" in ran.out
    assert "role:head=gn matches no layer" in ran.out  # an earlier rule has it
    found = cli("inspect", "parts.py:build", *rules, "--json").json["rules"]
    assert [rule["layers"] for rule in found] == [["backbone.1"], ["head.1"], []]


@pytest.mark.parametrize("rule", ["role:neck=gn", "*=foo"])
def test_inspect_refuses_rules_that_convert_would(cli: Cli, rule: str) -> None:
    ran = cli("inspect", "parts.py:build", "--rule", rule)
    assert (ran.code, ran.out) == (2, "")
    assert "unknown" in ran.err


@pytest.mark.parametrize(
    ("source", "role", "words"),
    [
        ("nets.py:tiny", "head", "The layers to convert are in: backbone (2)"),
        ("parts.py:build", "neck", "Roles are backbone, fpn, head"),
    ],
)
def test_a_role_that_is_not_there_is_said(cli: Cli, source: str, role: str, words: str) -> None:
    ran = cli("convert", source, "--rule", f"role:{role}=gn")
    assert ran.code == 2
    assert words in ran.err
