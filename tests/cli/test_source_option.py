"""--source, on every command that reads a converted file."""

from __future__ import annotations

from pathlib import Path

import pytest
from ran import Cli


@pytest.fixture
def moved(cli: Cli, images: Path, folder: Path) -> str:
    """A converted file whose code has got another name since."""
    assert cli("convert", "nets.py:tiny", "--arg", "width=16", "--to", "gn", "-o", "net.safetensors").code == 0
    (folder / "nets.py").rename(folder / "renamed.py")
    return "net.safetensors"


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("inspect", ()),
        ("convert", ("--to", "original", "-o", "out.safetensors")),
        ("verify", ()),
        ("calibrate", ("--data", "photos", "-o", "out.safetensors")),
        ("distil", ("--data", "photos", "--steps", "2", "--batch-size", "4", "-o", "out.safetensors")),
        ("finetune", ("--data", "photos", "--steps", "1", "--device", "cpu", "-o", "run")),
    ],
)
def test_every_command_takes_what_builds_a_converted_file(
    cli: Cli, moved: str, command: str, more: tuple[str, ...]
) -> None:
    refused = cli(command, moved, "--trust-code", *more)
    assert refused.code == 1
    assert "nets.py is neither in the current folder nor beside the file" in refused.err
    assert "--source says where it is: FOLDER/nets.py:tiny" in refused.err
    ran = cli(command, moved, "--source", "renamed.py:tiny", *more)
    assert ran.code == 0, ran.err


def test_the_source_goes_to_the_converted_one_of_two_networks(cli: Cli, moved: str) -> None:
    ran = cli("verify", "renamed.py:tiny", moved, "--arg", "width=16", "--source", "renamed.py:tiny")
    assert ran.code == 0, ran.err


def test_the_result_names_the_new_source(cli: Cli, moved: str) -> None:
    assert cli("calibrate", moved, "--data", "photos", "--source", "renamed.py:tiny").code == 0
    assert cli("inspect", "net-calibrated.safetensors", "--trust-code").code == 0


def test_a_network_that_is_no_converted_file_has_no_other_source(cli: Cli) -> None:
    ran = cli("inspect", "nets.py:tiny", "--source", "nets.py:tiny")
    assert ran.code == 2
    assert "--source goes with a file that normswap wrote" in ran.err
