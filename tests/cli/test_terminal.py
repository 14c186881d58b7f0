"""How results look on a terminal, and that they are plain elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import typer

from normswap.cli.terminal.flags import written
from normswap.cli.terminal.output import Output
from normswap.cli.terminal.render import Page, size
from normswap.cli.terminal.suggestions import changed, command
from normswap.display.overview import number_range
from normswap.display.printable import printable
from normswap.errors import Fix, NormswapError, Text, plural


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Terminal]:
    """A terminal of so many columns."""

    def of(columns: int) -> Terminal:
        for name in ("NO_COLOR", "FORCE_COLOR", "LINES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))
        return Terminal()

    return of


ROWS = [[("layer1.{0..2}.bn1", "path"), "3", "BatchNorm2d"], [("[red]", "path"), "12", "BatchNorm2d"]]
COLUMNS = ("layer", ">layers", "type")


def table(stream: io.StringIO) -> str:
    Page(stream).table(COLUMNS, ROWS)
    return stream.getvalue()


def test_a_table_is_plain_and_unwrapped_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    expected = [
        "layer              layers  type",
        "layer1.{0..2}.bn1       3  BatchNorm2d",
        "[red]                  12  BatchNorm2d",
    ]
    assert table(io.StringIO()).splitlines() == expected


def test_a_table_is_coloured_on_a_terminal(terminal: Callable[[int], Terminal]) -> None:
    shown = table(terminal(80))
    assert "\x1b[36mlayer1.{0..2}.bn1\x1b[0m" in shown
    assert "\x1b[36m[red]\x1b[0m" in shown


def test_no_color_and_dumb_terminals_are_respected(
    terminal: Callable[[int], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = terminal(80)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in table(stream)
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in table(Terminal())


def test_a_narrow_terminal_gets_what_is_the_same_everywhere_below_the_table(
    terminal: Callable[[int], Terminal],
) -> None:
    shown = table(terminal(30))
    assert "all: type BatchNorm2d" in shown
    assert max(len(line) for line in table(terminal(12)).splitlines()) < 40


def test_control_characters_never_reach_the_terminal() -> None:
    assert printable("a\x1b[2Jb\tc\udcff\n") == "a\\x1b[2Jb\\tc\\udcff\n"


def test_numbers_for_readers() -> None:
    assert [size(count) for count in (0, 1023, 1024, 102_760_448, 2**31)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "98.0 MiB",
        "2.0 GiB",
    ]
    assert [number_range(values) for values in ([64], [64, 1760, 128])] == ["64", "64-1760"]
    assert [plural(count, "layer") for count in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]


def test_steps_overwrite_each_other_on_a_terminal_and_are_lines_elsewhere(
    terminal: Callable[[int], Terminal],
) -> None:
    live, plain = terminal(80), io.StringIO()
    for stream in (live, plain):
        output = Output(io.StringIO(), stream, as_json=False, quiet=False)
        output.step("building")
        output.step("planning")
        output.note("mind this")
        output.close()
    assert live.getvalue() == "building …\r\x1b[2Kplanning …\r\x1b[2Knote: mind this\n"
    assert plain.getvalue() == "building …\nplanning …\nnote: mind this\n"


def test_a_progress_bar_passes_everything_on(terminal: Callable[[int], Terminal]) -> None:
    stream = terminal(80)
    output = Output(io.StringIO(), stream, as_json=False, quiet=False)
    assert list(output.track(range(5), 5, "comparing [1]")) == list(range(5))
    assert "comparing [1]" in stream.getvalue()
    quiet = io.StringIO()
    silent = Output(io.StringIO(), quiet, as_json=False, quiet=True)
    assert list(silent.track(range(5), 5, "comparing")) == list(range(5))
    assert quiet.getvalue() == ""


@pytest.mark.parametrize(
    ("fix", "python", "flags"),
    [
        (Fix("groups", 32), "groups=32", "--groups 32"),
        (Fix("indivisible", "nearest"), 'indivisible="nearest"', "--indivisible nearest"),
        (Fix("train", "fc.*"), 'train="fc.*"', "--train 'fc.*'"),
        (Fix("rules", {"PATH": "keep"}), 'rules={"PATH": "keep"}', "--rule 'PATH=keep'"),
        (Fix("args", {"num_classes": 10}), 'args={"num_classes": 10}', "--arg num_classes=10"),
        (Fix("trust_pickle", True), "trust_pickle=True", "--trust-pickle"),
        (Fix("overwrite", True), "overwrite=True", "--force"),
        (Fix("check", False), "check=False", "--no-check"),
        (Fix("strict", False), "strict=False", "--approximate"),
        (Fix("sources"), "sources", "--from"),
        (Fix("batch_size"), "batch_size", "--batch-size"),
    ],
)
def test_an_option_is_an_argument_in_python_and_a_flag_on_the_command_line(fix: Fix, python: str, flags: str) -> None:
    assert str(fix) == python
    assert written(fix) == flags


def test_a_text_is_what_python_says_and_keeps_its_options_as_data() -> None:
    text = Text("Lower ", Fix("batch_size"), ".\nOr give ", Text(Fix("model"), "."))
    assert text == "Lower batch_size.\nOr give model."
    assert text.written(lambda fix: f"<{fix.option}>") == "Lower <batch_size>.\nOr give <model>."
    assert [line.fixes for line in text.lines()] == [(Fix("batch_size"),), (Fix("model"),)]
    assert Text.joined(", ", ["a", Text(Fix("b")), "c"]).parts == ("a", ", ", Fix("b"), ", ", "c")


def test_what_a_command_lacks_is_no_way_out_there() -> None:
    hint = Text("Pass ", Fix("trust_code", True), ".\nElse pass the network as ", Fix("model"), ".")
    error = NormswapError(Text(Fix("seed"), " must be less, groups=2 too"), hint=hint)
    assert error.written(lambda fix: written(fix, {"--trust-code", "--seed"})) == (
        "--seed must be less, groups=2 too\nPass --trust-code."
    )
    assert str(error) == "seed must be less, groups=2 too\nPass trust_code=True.\nElse pass the network as model."
    assert error.hint == hint


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["convert", "m", "--groups", "8"], ["convert", "m", "--groups", "auto"]),
        (["convert", "--groups=8", "m"], ["convert", "--groups", "auto", "m"]),
        (["convert", "m"], ["convert", "m", "--groups", "auto"]),
        (["--indivisible", "error", "--groups", "3", "m"], ["--groups", "auto", "m"]),
    ],
)
def test_a_command_is_repeated_with_one_thing_changed(args: list[str], expected: list[str]) -> None:
    assert changed(args, ("--groups", "--indivisible"), ("--groups", "auto")) == expected


def test_a_repeated_command_is_quoted_for_the_shell() -> None:
    assert command(["verify", "a b.safetensors", "*=gn"]) == "normswap verify 'a b.safetensors' '*=gn'"


def test_completion_offers_norm_names() -> None:
    from normswap.cli import app
    from normswap.cli.arguments.options import norm_names, target_names

    assert norm_names("ln") == ["ln", "ln-channel"]
    assert target_names("o") == ["original"]
    root: Any = typer.main.get_command(app)
    assert {"inspect", "convert", "verify", "norms"} <= set(root.commands)
