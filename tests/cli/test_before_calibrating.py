"""What `convert` does for those who give it no images: a larger eps, and a word on what calibrating would gain."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from ran import Cli

import normswap

pytestmark = pytest.mark.usefixtures("trial")

TRAINED = """
import torch
from torch import nn
from normswap.data.photographs import crops

def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, momentum=None), nn.ReLU()]
    layers += [nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16, momentum=None), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    with torch.no_grad():
        model.train()(crops(64, (32, 32)))
    return model.eval()
"""


MASKED = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)
        self.norm.running_mean.normal_()

    def forward(self, x, lengths):
        assert lengths.shape == x.shape[:1]
        return self.norm(self.conv(x)).sum(2) / lengths[:, None]
"""


def loaded(file: str) -> torch.nn.Module:
    return normswap.load(file, trust_code=True)


def test_eps_is_1_where_the_input_is_standardised_and_left_to_calibration(cli: Cli, images: Path) -> None:
    fixed = ("convert", "nets.py:tiny", "--to", "gn", "--groups", 4)
    assert cli(*fixed).code == 0
    assert cli(*fixed, "--eps", "0.5", "-o", "own.safetensors").code == 0
    found = [loaded("tiny-gn.safetensors")[1].eps, loaded("own.safetensors")[1].eps]
    for name in ("tiny-gn", "own"):
        assert cli("calibrate", f"{name}.safetensors", "--data", str(images), "--trust-code").code == 0
        found.append(loaded(f"{name}-calibrated.safetensors")[1].eps)
    assert found == [1.0, 0.5, 4.0, 0.5]


def test_what_calibration_would_gain_is_measured_and_its_command_works(cli: Cli, folder: Path) -> None:
    fixed = ("convert", "trained.py:net", "--to", "gn", "--groups", 4)
    (folder / "trained.py").write_text(TRAINED)
    ran = cli(*fixed)
    assert ran.code == 0, ran.err
    assert "off the original's, relatively, on 13 photographs" in ran.out
    line = next(line for line in ran.out.splitlines() if "normswap calibrate" in line)
    command = shlex.split(line.partition("   (")[0].strip().replace("FOLDER", "photos"))
    assert cli(*command[1:]).code == 0
    trial = cli(*fixed, "--json", "--force").json["trial"]
    assert trial["calibrated"] < trial["drift"]
    plain = loaded("net-gn.safetensors").state_dict()
    assert cli(*fixed, "--json", "--force", "--calibrate", "none").json["trial"] is None
    assert all(torch.equal(plain[name], tensor) for name, tensor in loaded("net-gn.safetensors").state_dict().items())


def test_nothing_is_promised_where_no_photographs_fit(cli: Cli, folder: Path) -> None:
    (folder / "trained.py").write_text(TRAINED.replace("crops(64, (32, 32))", "100 * torch.randn(64, 3, 32, 32)"))
    ran = cli("convert", "trained.py:net", "--to", "gn", "--groups", 4)
    assert ran.code == 0, ran.err
    assert "photographs" not in ran.out
    assert "normswap calibrate net-gn.safetensors --data FOLDER --trust-code   (unlabelled images)" in ran.out


@pytest.mark.parametrize("inputs", [(), ("--input", "2,3,32", "--input", "2=32,20")])
def test_no_folder_of_images_is_named_for_networks_of_sequences(
    cli: Cli, folder: Path, inputs: tuple[str, ...]
) -> None:
    (folder / "masked.py").write_text(MASKED)
    ran = cli("convert", "masked.py:Net", "--to", "gn", "--groups", 4, *inputs)
    assert ran.code == 0, ran.err
    assert "FOLDER" not in ran.out
    assert "normswap.calibrate(model, data=data) in Python takes data of your own" in ran.out


def test_a_trial_that_fails_costs_no_conversion(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    (folder / "trained.py").write_text(TRAINED)
    monkeypatch.setattr("normswap.calibration.calibrate.calibrate", fails)
    ran = cli("convert", "trained.py:net", "--to", "gn", "--groups", 4, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["trial"] == {"images": None, "inputs": None, "drift": None, "calibrated": None}
    assert Path("net-gn.safetensors").exists()
