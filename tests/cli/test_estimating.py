"""`normswap convert` of weights whose running statistics were never updated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ran import Cli
from safetensors.torch import load_file
from torch import nn


@pytest.fixture
def neglected(nets: Any, folder: Path) -> Path:
    """Weights of the tiny network, as training without running statistics leaves them."""
    net = nets.tiny()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    torch.save(net.state_dict(), folder / "neglected.pth")
    return folder / "neglected.pth"


CONVERT = ("convert", "nets.py:tiny", "--to", "gn", "--groups", "2", "--weights")


def test_without_images_it_says_so_and_names_the_way_out(cli: Cli, neglected: Path, folder: Path) -> None:
    ran = cli(*CONVERT, neglected)
    assert ran.code == 1
    said = " ".join(ran.err.split())
    assert "statistics of nets.py:tiny were never updated: mean 0, variance 1 in all of its 2 norms" in said
    assert "--calibrate FOLDER estimates them first" in said
    assert not list(folder.glob("*.safetensors"))


def test_with_images_they_are_estimated_before_the_conversion(
    cli: Cli, neglected: Path, images: Path, folder: Path, nets: Any
) -> None:
    size = ("--size", "20", "--mean", "0,0,0", "--std", "1,1,1")
    ran = cli(*CONVERT, neglected, "--calibrate", images, *size, "-o", "gn.safetensors")
    assert ran.code == 0, ran.err
    assert "were never updated: estimated on 12 images" in " ".join(ran.err.split())
    assert cli("convert", "gn.safetensors", "--to", "original", "-o", "bn.safetensors", "--trust-code").code == 0
    state = load_file("bn.safetensors")
    pixels = [torch.from_numpy(np.array(Image.open(file))) for file in sorted(images.rglob("*.png"))]
    first = nets.tiny()[0]
    with torch.no_grad():
        y = first(torch.stack(pixels).movedim(3, 1) / 255)
    torch.testing.assert_close(state["1.running_mean"], y.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["1.running_var"], y.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert torch.equal(state["0.weight"], first.weight)


def test_copying_alone_random_weights_and_other_norms_go_on(cli: Cli, neglected: Path) -> None:
    assert cli(*CONVERT, neglected, "--transfer", "copy").code == 0
    ran = cli("convert", "nets.py:tiny", "--weights", neglected, "--to", "frozen")
    assert ran.code == 0
    assert "were never updated" in " ".join(ran.err.split())
    ran = cli("convert", "nets.py:fresh", "--to", "gn", "--groups", "2")
    assert ran.code == 0
    assert "were never updated" not in " ".join(ran.err.split())


def test_what_stands_in_for_images_does_not_estimate_what_it_is_made_by(cli: Cli, neglected: Path) -> None:
    for words in ("photos", "synthetic"):
        ran = cli(*CONVERT, neglected, "--calibrate", words)
        assert ran.code == 1
        assert "--calibrate FOLDER estimates them first" in " ".join(ran.err.split())
