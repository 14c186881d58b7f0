"""Errors that a user meets first: a file that is not there, hundreds of layers that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from ran import Cli

from normswap.cli.terminal.problem_lines import problem_lines


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("inspect", ()),
        ("convert", ("--to", "gn")),
        ("convert", ("--to", "original")),
        ("calibrate", ("--data", ".")),
        ("distil", ("--data", ".")),
        ("finetune", ("--data", ".")),
        ("verify", ()),
    ],
)
def test_a_converted_file_that_is_not_there_is_told_as_such(cli: Cli, command: str, more: tuple[str, ...]) -> None:
    Path("tiny-ln.safetensors").touch()
    ran = cli(command, "tiny-gn.safetensors", *more)
    assert ran.code == 1
    assert "error: tiny-gn.safetensors does not exist\nDid you mean tiny-ln.safetensors?\n" in ran.err
    assert "normswap wrote" not in ran.err
    assert "Convert" not in ran.err


@pytest.mark.parametrize("command", ["calibrate", "distil"])
def test_weights_alone_are_not_offered_to_be_converted(cli: Cli, command: str) -> None:
    Path("mine.pth").touch()
    ran = cli(command, "mine.pth", "--data", ".")
    assert ran.code == 1
    assert "error: mine.pth is not a file that normswap wrote\n" in ran.err
    assert "normswap convert SOURCE --weights mine.pth\n" in ran.err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("convert", "broken.py:net", "--to", "gn", "--calibrate", "nowhere"), "there is no folder nowhere"),
        (("convert", "broken.py:net", "--to", "gn", "--weights", "nowhere.pth"), "nowhere.pth does not exist"),
        (("finetune", "broken.py:net", "--data", "nowhere"), "there is no folder nowhere"),
        (("finetune", "broken.py:net", "--data", ".", "--eval-data", "nowhere"), "there is no folder nowhere"),
        (("finetune", "broken.py:net", "--data", ".", "--to", "gn", "--calibrate", "nowhere"), "no folder nowhere"),
        (
            ("finetune", "broken.py:net", "--task", "detection", "--data", ".", "--annotations", "no.json"),
            "no.json does",
        ),
        (("evaluate", "broken.py:net", "--data", "nowhere"), "there is no folder nowhere"),
        (("compare", "broken.py:net", "--data", "nowhere"), "there is no folder nowhere"),
        (("verify", "broken.py:net", "broken.py:net", "--data", "nowhere"), "there is no folder nowhere"),
        (("advise", "broken.py:net", "--data", "nowhere"), "there is no folder nowhere"),
        (("calibrate", "tiny-gn.safetensors", "--data", "nowhere"), "there is no folder nowhere"),
        (("distil", "tiny-gn.safetensors", "--data", "nowhere"), "there is no folder nowhere"),
        (("card", "tiny-gn.safetensors", "--evaluation", "no.json"), "no.json does not exist"),
    ],
)
def test_what_is_not_there_is_told_before_a_network_is_built(
    cli: Cli, folder: Path, arguments: tuple[str, ...], what: str
) -> None:
    (folder / "broken.py").write_text("raise SystemExit('built')\n")
    (folder / "tiny-gn.safetensors").write_text("never read")
    ran = cli(*arguments)
    assert (ran.code, ran.out) == (1, "")
    assert f"{what}" in ran.err
    assert "PyTorch" not in ran.err


def test_layers_that_do_not_fit_are_collapsed_and_the_way_out_comes_after_them(cli: Cli, folder: Path) -> None:
    (folder / "deep.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(*(nn.Sequential(nn.Conv2d(3 if i == 0 else 12, 12, 1), nn.BatchNorm2d(12)) "
        "for i in range(200)))\n"
    )
    ran = cli("convert", "deep.py:build", "--weights", "none", "--to", "gn", "--groups", "5")
    told = ran.err.partition("error: ")[2].splitlines()
    assert told[0] == "200 layers cannot be converted as asked:"
    assert "--indivisible nearest" in told[3]
    assert told[1] == (
        "  {0..199}.1 (BatchNorm2d): 12 channels do not divide into 5 groups; allowed groups: 1, 2, 3, 4, 6, 12"
    )
    assert len(told) < 8


def test_layers_that_are_not_alike_are_cut_short_unless_all_are_wanted(cli: Cli, folder: Path) -> None:
    names = ["".join(chr(97 + int(digit)) for digit in f"{i:03}") for i in range(100)]
    (folder / "odd.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    model = nn.Sequential()\n"
        f"    for name in {names!r}:\n"
        "        model.add_module(name, nn.BatchNorm2d(12))\n"
        "    return model\n"
    )
    asked = ("convert", "odd.py:build", "--weights", "none", "--to", "gn", "--groups", "5")
    ran = cli(*asked)
    assert "\n  and 81 more lines; --verbose shows them all\n--indivisible nearest" in ran.err
    assert ran.err.count("(BatchNorm2d)") == 19
    every = cli(*asked, "--verbose").err
    assert all(f"  {name} (BatchNorm2d): 12 channels" in every for name in names)


def test_reasons_that_differ_in_numbers_become_ranges() -> None:
    problems = [f"a.{i}.bn (BN): {8 * i} channels do not divide into 7 groups; allowed: {i}" for i in range(1, 5)]
    assert problem_lines(problems) == ["a.{1..4}.bn (BN): 8-32 channels do not divide into 7 groups"]
    problems = ["a.0.bn: folded into a.0.conv, it leaves", "a.1.bn: folded into a.1.conv, it leaves", "no path at all"]
    assert problem_lines(problems) == ["a.{0,1}.bn: folded into conv, it leaves", "no path at all"]
