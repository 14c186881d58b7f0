"""Only what is normswap's own fault is called a bug; the machine, numbers and the user's code are named instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ran import Cli

OWN = """
import torch
from torch import nn


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.b(self.a(x))

    def named_modules(self, *args, **kwargs):
        raise KeyError("of my own")


def lazy():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LazyLinear(3))
"""


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("1,3,400000000,400000000", "there is not enough memory"),
        ("99999999999999999999,3,8,8", "a size or another number is too large"),
        ("4000000000,3,4000000000,8", "a size or another number is too large"),
    ],
)
def test_inputs_beyond_the_machine_are_no_bug(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, shape: str, words: str
) -> None:
    monkeypatch.setattr("normswap.cli.arguments.inputs.check_memory", lambda *given: None)
    ran = cli("inspect", "nets.py:tiny", "--input", shape)
    assert ran.code == 1
    assert f"error: {words} (" in ran.err
    assert "bug" not in ran.err


@pytest.mark.parametrize("seed", ["99999999999999999999999", "4294967296", "-1"])
@pytest.mark.parametrize("name", ["convert", "verify"])
def test_a_seed_that_no_generator_takes_is_a_wrong_call(cli: Cli, name: str, seed: str) -> None:
    arguments = ["nets.py:tiny", "--to", "ln"] if name == "convert" else ["nets.py:tiny", "nets.py:tiny"]
    ran = cli(name, *arguments, "--seed", seed)
    assert ran.code == 2
    assert "--seed" in ran.err


def test_code_of_the_users_own_that_fails_is_named(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(OWN)
    line = 1 + OWN.splitlines().index('        raise KeyError("of my own")')
    ran = cli("inspect", "own.py:Own", "--weights", "DEFAULT")
    assert ran.code == 1
    assert f"own.py:{line} failed (KeyError: 'of my own')" in ran.err
    assert "bug" not in ran.err


def test_layers_that_wait_for_their_first_input_are_no_bug(cli: Cli, folder: Path) -> None:
    (folder / "own.py").write_text(OWN)
    ran = cli("inspect", "own.py:lazy", "--input", "2,3,8,8")
    assert "bug" not in ran.err


@pytest.mark.skipif(sys.platform == "win32", reason="closes a stream as a POSIX shell does")
def test_a_closed_standard_output_is_no_bug() -> None:
    command = f"{sys.executable} -m normswap recipes >&-"
    ran = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_what_torch_says_is_quoted_as_it_says_it(cli: Cli) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "ln", "--input", "1,5,8,8")
    assert ran.code == 1
    assert "Given groups=1, weight of size" in ran.err
