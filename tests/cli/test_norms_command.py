from __future__ import annotations

import io
import re
from typing import Any

import pytest
from ran import Cli

import normswap.norms  # noqa: F401  (registers them)
from normswap.choices import NORMS
from normswap.cli import app
from normswap.norms.registry import specs, targets


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
    assert "Did you mean gn?" in ran.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """The lines of `normswap norms`, without colours."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    with pytest.raises(SystemExit) as end:
        app(["norms", *words])
    assert end.value.code == 0
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in stream.getvalue().split("\n")]


def row(lines: list[str], name: str) -> list[str]:
    """Its row of the matrix."""
    found = [words[1:] for line in lines if (words := line.split())[:1] == [name]]
    return next(words for words in found if len(words) == len(targets()))


def test_the_matrix_is_in_words_where_they_fit_and_in_signs_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = on_a_terminal(80, monkeypatch), on_a_terminal(140, monkeypatch)
    signs = {"exact": "=", "close": "~", "images": "+", "refused": "-"}
    assert all(len(line) <= 80 for line in narrow)
    assert all(len(line) <= 140 for line in wide)
    for spec in specs():
        if not spec.fuses:
            assert [signs[word] for word in row(wide, spec.name)] == row(narrow, spec.name)
    assert row(wide, "gn")[:4] == ["images"] * 4
    assert "= exact, ~ close, - refused, + needs images (--calibrate)" in narrow
    assert "gn to ln: exact from one group." in wide


def test_one_norm_has_its_row_and_column_with_the_reasons(cli: Cli) -> None:
    lines = [line.split() for line in cli("norms", "gn").out.splitlines()]
    assert ["gn", "ln", "close", "exact", "from", "one", "group"] in lines
    assert ["ln-channel", "gn", "close"] in lines
    assert ["gn", "bn", "needs", "images"] in lines
    refused = "ln gn refused close on vectors (N, C): its channels are the last dimension, the new norm's the second"
    assert refused.split() in lines
    assert not any(line[:2] == ["in", "bn"] for line in lines)


def test_json_holds_every_conversion(cli: Cli) -> None:
    cells = {(c["source"], c["target"]): c for c in cli("norms", "--json").json["conversions"]}
    assert len(cells) == len(targets()) * (len(targets()) - 1)
    assert cells["in", "gn"]["outcome"] == "exact"
    assert cells["gn", "fused"]["outcome"] == "needs images"
    assert cells["rms", "bn"]["why"] == "its channels are the last dimension, the new norm's the second"
    assert {"rms"} == {c["target"] for c in cli("norms", "rms", "--json").json["conversions"] if c["source"] == "ln"}
