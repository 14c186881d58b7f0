"""One name for one thing in every command, and a help that shows it well."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from ran import Cli

from normswap.cli import app
from normswap.cli.arguments.completion import model_names
from normswap.cli.terminal import help

ROOT: Any = typer.main.get_command(app)
READING = ("convert", "calibrate", "distil", "evaluate", "finetune", "verify")


def option(command: str, flag: str) -> Any:
    return next(p for p in ROOT.commands[command].params if flag in p.opts)


@pytest.mark.parametrize("command", ["inspect", *READING])
def test_every_command_that_runs_a_network_takes_a_device_with_one_default(command: str) -> None:
    assert option(command, "--device").default == "auto"


@pytest.mark.parametrize("command", READING)
def test_every_command_that_reads_images_skips_a_few_that_cannot_be_read(command: str) -> None:
    assert option(command, "--max-bad").default == 10


def test_an_image_that_cannot_be_read_is_named_and_skipped(cli: Cli, images: Path) -> None:
    (images / "red" / "0.png").write_bytes(b"no picture")
    ran = cli("verify", "nets.py:tiny", "nets.py:tiny", "--data", "photos")
    assert ran.code == 0, ran.err
    assert "skipped: red/0.png" in ran.out
    strict = cli("verify", "nets.py:tiny", "nets.py:tiny", "--data", "photos", "--max-bad", "0")
    assert strict.code == 1
    assert "--max-bad 1" in strict.err


def test_completion_knows_the_names_of_networks_without_importing_the_libraries() -> None:
    import timm
    import torchvision

    known = set(model_names(""))
    assert set(torchvision.models.list_models()) <= known
    assert {f"timm:{name}" for name in timm.list_models()} == set(model_names("timm:"))
    script = (
        "import sys, normswap.cli.arguments.completion as c; c.model_names('')\nprint({'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("command", ["distil", "finetune"])
def test_augment_is_a_word_wherever_it_is(command: str) -> None:
    assert option(command, "--augment").metavar == "auto|flip|none"


def test_the_number_of_images_to_calibrate_on_has_its_own_flag(cli: Cli) -> None:
    for command in ("convert", "finetune"):
        assert option(command, "--calibrate").metavar == "FOLDER|photos|synthetic|none"
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
