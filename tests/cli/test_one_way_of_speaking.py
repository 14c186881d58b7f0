"""One name for one thing in every command, and a help that shows it well."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
from ran import Cli

from normswap.cli import app, help

ROOT: Any = typer.main.get_command(app)
READING = ("convert", "calibrate", "distil", "finetune", "verify")


def option(command: str, flag: str) -> Any:
    return next(p for p in ROOT.commands[command].params if flag in p.opts)


@pytest.mark.parametrize("command", ["inspect", *READING])
def test_every_command_that_runs_a_network_takes_a_device_with_one_default(command: str) -> None:
    assert option(command, "--device").default == "auto"


@pytest.mark.parametrize("command", ["distil", "finetune"])
def test_augment_is_a_word_wherever_it_is(command: str) -> None:
    assert option(command, "--augment").metavar == "auto|flip|none"


def test_the_number_of_images_to_calibrate_on_has_its_own_flag(cli: Cli) -> None:
    for command in ("convert", "finetune"):
        assert option(command, "--calibrate").metavar == "FOLDER|none"
        ran = cli(command, "nets.py:tiny", "--data" if command == "finetune" else "--to", "gn", "--calibrate", "64")
        assert ran.code == 2
        assert "--calibrate-images 64" in ran.err


def test_old_names_are_understood_and_not_shown(cli: Cli) -> None:
    ran = cli("finetune", "nets.py:tiny", "--data", "photos", "--distill", "7")
    assert ran.code == 2
    assert "--distil" in ran.err
    assert "--distill" not in cli("finetune", "--help").out
    assert cli("distill", "--help").code == 0
    alone = cli("convert", "nets.py:tiny", "--to", "gn", "--images", "3")
    assert "--calibrate-images" in alone.err


@pytest.mark.parametrize("command", [*ROOT.commands])
def test_every_option_is_in_a_group(cli: Cli, command: str) -> None:
    shown = cli(command, "--help").out
    assert f"\n{help.OTHER}\n" not in shown
    assert "\nResult\n" in shown


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_help_is_as_wide_as_the_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = cli("finetune", "--help").out.splitlines()
    widest = max(len(line) for line in lines if "finetune " not in line and "|" not in line)
    assert columns * 0.9 < widest <= columns


def test_help_is_coloured_on_a_terminal_only(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in cli("distil", "--help").out
    monkeypatch.setattr(help, "is_terminal", lambda stream: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    context = ROOT.context_class(ROOT, info_name="normswap")
    coloured = ROOT.commands["distil"].get_help(context)
    assert "\x1b[36m--steps N\x1b[0m" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured).count("--steps N") == 1
