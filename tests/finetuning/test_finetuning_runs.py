"""`normswap.finetune` on the real digits network: what a run writes, and how a stopped one goes on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuned import SMALL, changed, lines, stop_at, tensors
from torch import nn

import normswap
from normswap.demo.network import pretrained
from normswap.errors import CheckpointError, Interrupted, OptionError, OutputError

# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pictures")
def test_a_run_leaves_its_files(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    report = normswap.finetune(gn, *data, batch_size=4, epochs=2, output=tmp_path / "run")
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "best.safetensors", "confusion.png", "curves.png", "last.safetensors", "metrics.jsonl", "state.pt",
    }  # fmt: skip
    last = normswap.load(report.last_file, model=pretrained())
    assert not changed(last, tensors(gn))
    assert all(p.requires_grad for p in last.parameters())
    history = last._normswap.history
    assert [entry.action for entry in history] == ["finetune"]
    assert history[0].steps == 20
    found = lines(folder)
    assert [line["step"] for line in found if "val_accuracy" in line] == [0, 10, 20]
    assert found[-1]["val_accuracy"] == pytest.approx(report.figures["val_accuracy"], rel=1e-5)


def test_the_best_network_is_kept(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    report = normswap.finetune(gn, *data, batch_size=4, epochs=3, output=tmp_path / "run", lr=0.05)  # too large a rate
    found = {line["step"]: line["val_accuracy"] for line in lines(tmp_path / "run") if "val_accuracy" in line}
    assert report.best == pytest.approx(max(found.values()), rel=1e-5)
    best = normswap.load(report.best_file, model=pretrained())
    x, y = data[1]
    with torch.no_grad():
        assert float((best(x).argmax(1) == y).float().mean()) == pytest.approx(report.best)


def test_a_new_head_is_loaded_with_the_file(data: Any, tmp_path: Path) -> None:
    (x, y), _ = data
    model = normswap.convert(pretrained(), "gn", groups=4)
    report = normswap.finetune(model, (x, y % 3), num_classes=3, output=tmp_path / "run", **SMALL)
    loaded = normswap.load(report.last_file, model=pretrained())
    assert loaded.classifier.out_features == 3
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model.eval()(x))
    again = normswap.save(loaded, tmp_path / "again.safetensors")
    assert normswap.load(again, model=pretrained()).classifier.out_features == 3


def test_a_folder_with_a_run_is_not_overwritten(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    normswap.finetune(gn, data[0], **SMALL, output=tmp_path)
    with pytest.raises(OutputError, match="holds a run already"):
        normswap.finetune(gn, data[0], **SMALL, output=tmp_path)
    normswap.finetune(gn, data[0], **SMALL, output=tmp_path, overwrite=True)
    assert [line["step"] for line in lines(tmp_path)] == [10]


def test_tensorboard_gets_the_same_figures(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    normswap.finetune(gn, *data, **SMALL, output=tmp_path, tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))


# --- stopping and going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "ema"), [("adamw", 0.9), ("sgd", 0.0)])
@pytest.mark.usefixtures("every_step")
def test_a_stopped_run_goes_on_bit_for_bit(data: Any, tmp_path: Path, optimizer: str, ema: float) -> None:
    settings = {"batch_size": 4, "epochs": 2, "optimizer": optimizer, "ema": ema, "lr": 1e-3, "label_smoothing": 0.1}
    whole, cut = (_with_dropout() for _ in range(2))
    normswap.finetune(whole, *data, **settings, output=tmp_path / "whole")
    for step in (3, 14):  # within the first epoch, and within the second
        with pytest.raises(Interrupted) as stopped:
            normswap.finetune(cut, *data, **settings, output=tmp_path / "cut", progress=stop_at(step), resume=step > 3)
        assert stopped.value.report.steps in (step, step + 1)
        cut = _with_dropout()
    report = normswap.finetune(cut, *data, **settings, output=tmp_path / "cut", resume=True)
    assert report.resumed_at in (14, 15)
    assert not changed(cut, tensors(whole))
    ends = [[line for line in lines(tmp_path / name) if "val_loss" in line] for name in ("whole", "cut")]
    assert ends[0] == ends[1]


def _with_dropout() -> nn.Module:
    model = normswap.convert(pretrained(), "gn", groups=4)
    model.classifier = nn.Sequential(nn.Dropout(0.3), model.classifier)
    return model


@pytest.mark.usefixtures("every_step")
def test_sigterm_saves_and_then_does_what_it_did_before(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        report = normswap.finetune(gn, data[0], **SMALL, output=tmp_path, progress=stop_at(4, signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert report.interrupted
    assert (tmp_path / "state.pt").is_file()


def test_resuming_needs_the_same_settings_and_a_state(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="resume from"):
        normswap.finetune(gn, data[0], **SMALL, output=tmp_path / "none", resume=True)
    normswap.finetune(gn, data[0], **SMALL, output=tmp_path / "run")
    with pytest.raises(OptionError, match="lr="):
        normswap.finetune(gn, data[0], **SMALL, output=tmp_path / "run", resume=True, lr=0.5)
    other = normswap.convert(pretrained(), "gn", groups=8)
    with pytest.raises(OptionError, match="another network"):
        normswap.finetune(other, data[0], **SMALL, output=tmp_path / "run", resume=True)
    (tmp_path / "run" / "state.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="not a complete"):
        normswap.finetune(gn, data[0], **SMALL, output=tmp_path / "run", resume=True)
