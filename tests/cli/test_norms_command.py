from __future__ import annotations

import io
from typing import Any

import pytest
from ran import Cli

import normswap.norms  # noqa: F401  (registers them)
from normswap.choices import NORMS
from normswap.cli import app
from normswap.registry import specs, targets


def test_the_names_in_the_help_are_those_of_the_registry() -> None:
    assert targets() == NORMS


def test_every_norm_is_listed_with_formula_axes_and_exact_conversions(cli: Cli) -> None:
    ran = cli("norms")
    assert ran.code == 0
    for spec in specs():
        assert spec.name in ran.out
        assert spec.formula in ran.out
        assert spec.axes in ran.out
        assert ", ".join(spec.exact_from) in ran.out


def test_one_norm_by_name(cli: Cli) -> None:
    ran = cli("norms", "gn")
    assert "GroupNorm" in ran.out
    assert "InstanceNorm" not in ran.out


def test_json_holds_the_same(cli: Cli) -> None:
    ran = cli("norms", "--json")
    assert [norm["name"] for norm in ran.json["norms"]] == list(targets())
    assert "in" in next(norm for norm in ran.json["norms"] if norm["name"] == "gn")["exact_from"]


def test_a_stdout_that_takes_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(SystemExit) as end:
        app(["norms"])
    assert end.value.code == 1
    assert capsys.readouterr().err.splitlines()[0] == "error: No space left on device"


def test_an_unknown_norm_is_an_error_with_a_near_match(cli: Cli) -> None:
    ran = cli("norms", "gnn")
    assert (ran.code, ran.out) == (2, "")
    assert "unknown norm 'gnn'" in ran.err
    assert "Did you mean 'gn'?" in ran.err
