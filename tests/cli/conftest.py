"""Runs the command line in this process, in a folder of its own with small networks to name."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from PIL import Image
from ran import COLOURS, Cli, Ran

from normswap.cli import app
from normswap.cli.commands import _calibration_trial

# What `app` makes anew at each call, from the signatures of all commands, which takes as long as many of these tests.
COMMAND: Any = typer.main.get_command(app)

NETS = '''
import torch
from torch import nn


def trained(model, seed=0):
    """Statistics, gamma and beta as after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.num_batches_tracked.fill_(7)
            with torch.no_grad():
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * 0.2)
                if module.bias is not None:
                    module.bias.zero_()
    return model


def tiny(width=8, seed=0):
    layers = [nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers += [nn.Conv2d(width, 2 * width, 3), nn.BatchNorm2d(2 * width)]
    return trained(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 4)), seed)


def real():
    """Its statistics are those of pictures with values from 0 to 1."""
    from normswap.data.photographs import crops
    model = tiny()
    for norm in (model[1], model[4]):
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        for _ in range(3):
            model(crops(64, (16, 16), seed=3))
    return model.eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.after = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.stem(x)
        return self.after(x + self.norm(self.conv(x)))


def residual():
    return trained(Residual())


def deep():
    blocks = [nn.Sequential(nn.Conv2d(3 if i == 0 else 4, 4, 1), nn.BatchNorm2d(4)) for i in range(12)]
    return trained(nn.Sequential(*blocks))


def odd():
    """Channels that no number of groups above 4 divides together."""
    return trained(nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 20, 1), nn.BatchNorm2d(20)))


def bracketed():
    model = nn.Sequential()
    model.add_module("[red]läyer[/red]", nn.Conv2d(3, 4, 1))
    model.add_module("[bold] norm", nn.BatchNorm2d(4))
    return trained(model)


class Unknown(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def suspicious():
    return trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), Unknown(4)))


def fresh():
    """Random weights, and the statistics of a new network."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


class GeneralizedRCNNTransform(nn.Module):
    """Named as torchvision names what its detectors prepare images with."""


class Detector(nn.Module):
    """Takes a list of images of any size and finds one box on each, as torchvision's detectors do."""

    def __init__(self):
        super().__init__()
        self.transform = GeneralizedRCNNTransform()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, images):
        def found(image):
            score = self.body(image[None]).mean().sigmoid().view(1) / 2 + 0.5
            return {"boxes": torch.tensor([[0.0, 0.0, 8.0, 8.0]]), "labels": torch.tensor([1]), "scores": score}

        return [found(image) for image in images]


def without_norm():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())


def frozen():
    from torchvision.ops import FrozenBatchNorm2d

    return nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))


def chatty():
    print("a user's own words")
    return tiny()


def leaves():
    raise SystemExit(3)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with nets.py in it."""
    (tmp_path / "nets.py").write_text(NETS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trial() -> None:
    """For tests of what `convert` says that calibrating would gain; to the others every network is too large for it."""


@pytest.fixture(autouse=True)
def _untried(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying it takes as long as all the rest of a conversion of networks as small as these."""
    if "trial" not in request.fixturenames:
        monkeypatch.setattr(_calibration_trial, "_LARGEST", 0)


@pytest.fixture
def cli(folder: Path) -> Cli:
    """`cli("convert", "nets.py:tiny", ...)` runs that command line."""

    def run(*args: object) -> Ran:
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                COMMAND([str(arg) for arg in args], prog_name="normswap")
            except SystemExit as end:
                code = int(end.code or 0)
        return Ran(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def nets(folder: Path) -> Any:
    """The module nets.py, as this process sees it."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("nets_for_tests", folder / "nets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def images(folder: Path) -> Path:
    """Four classes of three images of 20 x 20 pixels, as many as the small network tells apart."""
    generator = torch.Generator().manual_seed(1)
    for name, colour in COLOURS.items():
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(3):
            noise = torch.randint(-40, 40, (20, 20, 3), generator=generator)
            pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "photos" / name / f"{i}.png")
    return folder / "photos"
