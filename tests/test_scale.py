"""The arithmetic of docs/scale.md, against figures that others have published and against what is really there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import normswap
from normswap.checkpoint.undo_tensors import undo_tensors
from normswap.conversion.record import record_of
from normswap.demo.network import DigitNet, pretrained

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = found  # which its dataclass looks for
    spec.loader.exec_module(found)
    return found


def test_the_3d_unet_has_the_parameters_that_its_paper_counts(scale: ModuleType) -> None:
    with torch.device("meta"):
        network = scale.UNet3d()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm3d)]
    without = sum(p.numel() for p in network.parameters()) - sum(p.numel() for m in norms for p in m.parameters())
    assert without == 19_069_955
    assert network(torch.empty(1, 3, 132, 132, 116, device="meta")).shape == (1, 3, 44, 44, 28)


def test_the_undo_record_is_as_large_as_computed(scale: ModuleType) -> None:
    real = undo_tensors(record_of(normswap.convert(pretrained(), "gn", groups=2)).undo)
    computed = scale.counted("digits", DigitNet, "Block").undo()
    assert computed == pytest.approx(sum(t.numel() * t.element_size() for t in real.values()), rel=0.02)


def test_counts_are_those_of_the_network(scale: ModuleType) -> None:
    found = scale.counted("digits", DigitNet, "Block")
    assert (found.parameters, found.norms, found.channels) == (75_722 - 336, 12, 336)  # without biases of folds
    assert found.group == 2 * (32 * 32 * 9) + 4 * 32
    assert (found.replicated(), found.sharded(1)) == (20 * 75_386, 16 * 75_386 + 12 * found.group)


def test_one_gpu_sends_nothing_and_eight_send_what_rings_do(scale: ModuleType) -> None:
    found = scale.Counted("", 1000, 100, 2, 24, 0)
    assert (found.all_reduce(1), found.gathers(1), found.synced(1)) == (0, 0, 0)
    assert found.all_reduce(8) == 14 * 4 * 1000 / 8  # 7 steps of scattering and 7 of gathering, an eighth each
    assert found.gathers(8) == 21 * 4 * 1000 / 8
    assert found.synced(2) == 4 * (2 * 24 + 2) + 4 * 2 * 24


def test_the_page_has_the_rows_of_resnet50_as_they_are_computed(scale: ModuleType) -> None:
    name, build, block = next(scale.networks())
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    for line in scale.tables([scale.counted(name, build, block)]).splitlines():
        assert line in page
