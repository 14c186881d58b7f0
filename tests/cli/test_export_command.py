"""`normswap export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ran import Cli

import normswap

pytestmark = pytest.mark.filterwarnings("ignore")  # of onnxscript and onnx at import


def test_a_converted_file_becomes_onnx(cli: Cli) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", "2").code == 0
    ran = cli("export", "tiny-gn.safetensors", "--trust-code", "--to", "onnx", "--input", "1,3,16,16")
    assert ran.code == 0, ran.err
    assert "inputs     Nx3x16x16" in ran.out
    assert "operators  opset 21, 2 GroupNormalization" in ran.out
    assert Path("tiny-gn.onnx").is_file()
    again = cli("export", "tiny-gn.safetensors", "--trust-code", "--to", "onnx", "--input", "1,3,16,16")
    assert (again.code, again.out) == (1, "")
    assert "tiny-gn.onnx exists already\n--force replaces it" in again.err


def test_a_network_that_was_never_converted_is_exported_too(cli: Cli, nets: Any) -> None:
    ran = cli("export", "nets.py:tiny", "--to", "exported", "-o", "a.pt2", "--input", "1,3,9,9", "--json")
    assert ran.json["shapes"] == [[2, 3, 9, 9]]
    x = torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load("a.pt2").module()(x), nets.tiny().eval()(x))


def test_the_size_is_what_the_file_remembers_or_is_told_to_be_a_guess(cli: Cli) -> None:
    assert cli("convert", "nets.py:real", "--to", "gn", "--groups", "2").code == 0
    ask = ["--trust-code", "--to", "torchscript", "--json"]
    assert "--input N,C,H,W says it" in cli("export", "real-gn.safetensors", *ask).err
    more = ["--data", "photos", "--size", "20,24", "--images", "4"]
    assert cli("calibrate", "real-gn.safetensors", "--trust-code", *more).code == 0
    ran = cli("export", "real-gn-calibrated.safetensors", *ask)
    assert ran.json["shapes"] == [[2, 3, 20, 24]]
    assert "--input" not in ran.err


@pytest.mark.usefixtures("images")
def test_a_size_that_training_or_calibrating_was_given_is_remembered_where_inputs_are_made_up(cli: Cli) -> None:
    ask = ["--trust-code", "--json"]
    train = ["--to", "gn", "--groups", "4", "--calibrate-images", "4", "--steps", "1", "-o", "run", "--device", "cpu"]
    assert cli("finetune", "nets.py:tiny", *ask, "--data", "photos", "--size", "18", *train).code == 0
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", "4").code == 0
    calibrated = ["--data", "photos", "--size", "14,16", "--images", "4"]
    assert cli("calibrate", "tiny-gn.safetensors", *ask, *calibrated).code == 0
    for file, size in (("run/best.safetensors", [18, 18]), ("tiny-gn-calibrated.safetensors", [14, 16])):
        ran = cli("export", file, *ask, "--to", "torchscript", "--force")
        assert ran.json["shapes"] == [[2, 3, *size]], ran.err
        assert "guess" not in ran.err
        assert normswap.load(file, trust_code=True)._normswap.inputs["shape"] == [3, *size]
    ran = cli("verify", file, "nets.py:tiny", *ask)
    assert ran.json["images"] == 8, ran.err


@pytest.mark.parametrize(
    "more", [[], ["--to", "onyx"], ["--to", "exported", "--opset", "20"], ["--to", "onnx", "--opset", "3"]]
)
def test_calls_that_make_no_sense_are_usage_errors(cli: Cli, more: list[str]) -> None:
    ran = cli("export", "nets.py:tiny", *more)
    assert (ran.code, ran.out) == (2, "")


def test_the_code_that_builds_the_network_is_not_written_over(cli: Cli, folder: Path) -> None:
    ran = cli("export", "nets.py:tiny", "--to", "onnx", "-o", "nets.py", "--force")
    assert ran.code == 1
    assert "def tiny" in (folder / "nets.py").read_text()
