"""States of runs that an earlier version wrote go on, or say in one sentence why they cannot."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import CheckpointError
from normswap.training.run_state import load_state, save_state

FOLDER = Path(__file__).parents[1] / "checkpoint" / "written_by_0_1"
needs_files = pytest.mark.skipif(not FOLDER.is_dir(), reason="the files of earlier versions are not there")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    from nets import residual

    return residual()


@needs_files
def test_a_fine_tuning_that_was_cut_goes_on_to_what_it_would_have_been(
    original: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    shutil.copytree(FOLDER / "cut", tmp_path / "cut")
    model, data = normswap.load(FOLDER / "folded.safetensors", model=original), (x, torch.arange(24) % 3)
    report = normswap.finetune(model, data, data, output=tmp_path / "cut", batch_size=4, epochs=2, lr=0.01, resume=True)
    assert (report.resumed_at, report.steps) == (7, 12)
    wanted = torch.load(FOLDER / "outputs.pt", weights_only=True)["run/last"]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x[:4]), wanted, rtol=1e-5, atol=1e-6)


@needs_files
def test_a_distillation_of_before_anything_was_held_back_cannot_go_on(original: nn.Module, x: Tensor) -> None:
    model = normswap.convert(original, "gn", groups=2, example_inputs=x[:2])
    normswap.calibrate(model, original, x)
    with pytest.raises(CheckpointError, match="written by an older normswap"):
        normswap.distil(model, original, x, steps=6, batch_size=8, resume=FOLDER / "distil.state")


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({"distill": 0.5}, {"distil": 0.5}),
        ({"augment": True}, {"augment": "auto"}),
        ({"augment": False}, {"augment": "none"}),
    ],
)
def test_settings_that_were_named_otherwise_are_the_same(
    then: dict[str, object], now: dict[str, object], tmp_path: Path
) -> None:
    save_state(tmp_path / "state.pt", then, {"parameters": {}})
    assert load_state(tmp_path / "state.pt", now, {})["settings"] == now
