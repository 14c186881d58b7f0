"""Distillation that is stopped, goes on, or goes wrong: what was reached is kept."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import SHORT
from helpers import contents
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.distillation.judging import Judge, Look
from normswap.distillation.report import Progress
from normswap.errors import CheckpointError, DataError, Interrupted, OptionError, RevertError, TrainingError


class Stop:
    """Ctrl-C, or another end, after so many steps."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.after, self.error, self.seen = after, error, 0

    def __call__(self, progress: Progress) -> None:
        self.seen = progress.step
        if progress.step == self.after:
            raise self.error


def sources(images: Tensor) -> dict[str, Any]:
    return {
        "tensor": images,
        "dataset": TensorDataset(images),
        "loader": DataLoader(TensorDataset(images), batch_size=8, shuffle=True),
        "batches": list(images.split(8)),
    }


@pytest.mark.parametrize("kind", ["tensor", "dataset", "loader", "batches"])
@pytest.mark.parametrize("after", [3, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(
    original: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path, kind: str, after: int
) -> None:
    data, whole, options = sources(images)[kind], copy.deepcopy(model), {**SHORT, "steps": 9}
    start = copy.deepcopy(model)
    expected = normswap.distil(whole, original, data, **options)
    state = tmp_path / "state.pt"
    with pytest.raises(Interrupted):
        normswap.distil(model, original, data, progress=Stop(after, KeyboardInterrupt()), checkpoint=state, **options)
    assert contents(model) != contents(whole)
    report = normswap.distil(start, original, data, resume=state, **options)
    assert contents(start) == contents(whole)
    assert (report.resumed_at, report.steps) == (after, 9)
    assert (report.loss_first, report.loss_last) == (expected.loss_first, expected.loss_last)


def test_a_resumed_run_keeps_the_same_state_wherever_it_was_stopped(
    original: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the nearest state comes before the stop, and the stop between a step and its measurement."""
    options: dict[str, Any] = {"steps": 9, "batch_size": 8, "lr": 0.15}
    nearer = Look.nearer
    monkeypatch.setattr(Look, "nearer", lambda self, *others: self.step < 6 and nearer(self, *others))
    whole, start, state = copy.deepcopy(model), copy.deepcopy(model), tmp_path / "state.pt"
    expected = normswap.distil(whole, original, images, **options)
    look = Judge.look

    def stopped(self: Judge, step: int) -> None:
        if step == 7:
            monkeypatch.setattr(Judge, "look", look)
            raise KeyboardInterrupt
        look(self, step)

    monkeypatch.setattr(Judge, "look", stopped)
    with pytest.raises(Interrupted):
        normswap.distil(model, original, images, checkpoint=state, **options)
    report = normswap.distil(start, original, images, resume=state, **options)
    assert contents(start) == contents(whole)
    assert 0 < report.kept < 6
    assert (report.kept, report.eval_loss_after) == (expected.kept, expected.eval_loss_after)


def test_a_folder_is_shuffled_and_resumes(tmp_path: Path, original: nn.Module, model: nn.Module) -> None:
    from PIL import Image

    for i in range(12):
        folder = tmp_path / "data" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    whole, start, state = copy.deepcopy(model), copy.deepcopy(model), tmp_path / "state.pt"
    options = {"steps": 6, "batch_size": 5}
    normswap.distil(whole, original, tmp_path / "data", **options)
    with pytest.raises(KeyboardInterrupt):
        normswap.distil(
            model, original, tmp_path / "data", progress=Stop(3, KeyboardInterrupt()), checkpoint=state, **options
        )
    normswap.distil(start, original, tmp_path / "data", resume=state, **options)
    assert contents(start) == contents(whole)


def test_resuming_needs_the_same_settings_and_network(
    original: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    state = tmp_path / "state.pt"
    normswap.distil(copy.deepcopy(model), original, images, checkpoint=state, **SHORT)
    before = contents(model)
    with pytest.raises(OptionError, match=r"lr=\S+ \(now 0\.03\)"):
        normswap.distil(model, original, images, resume=state, lr=0.03, **SHORT)
    other = normswap.convert(original, "gn", groups=4)
    with pytest.raises(OptionError, match="another conversion"):
        normswap.distil(other, original, images, resume=state, **SHORT)
    with pytest.raises(CheckpointError, match="does not exist"):
        normswap.distil(model, original, images, resume=tmp_path / "none.pt", **SHORT)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a complete"):
        normswap.distil(model, original, images, resume=state, **SHORT)
    assert contents(model) == before
    assert model._normswap.history == []


def test_a_finished_run_is_not_resumed(original: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    state, start = tmp_path / "state.pt", copy.deepcopy(model)
    normswap.distil(model, original, images, checkpoint=state, checkpoint_every=2, **SHORT)
    normswap.distil(start, original, images, resume=state, **SHORT)
    assert contents(start) == contents(model)


def test_norm_trains_gamma_and_beta_alone(original: nn.Module, model: nn.Module, images: Tensor) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    normswap.distil(model, original, images, train="norm", **SHORT)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{layer}.{kind}" for layer in ("stem.1", "block.bn1", "block.bn2") for kind in ("weight", "bias")}
    assert all(p.requires_grad for p in model.parameters())


def test_a_loss_that_is_not_finite_stops_at_the_last_good_state(
    original: nn.Module, model: nn.Module, images: Tensor
) -> None:
    """The weights are ruined after the third step was measured, which the fourth loss shows."""
    good = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        normswap.distil(good, original, images, progress=Stop(3, KeyboardInterrupt()), **SHORT)

    def poison(progress: Progress) -> None:
        if progress.step == 3:
            with torch.no_grad():
                model.head.weight.fill_(math.nan)

    with pytest.raises(TrainingError, match="step 4") as caught:
        normswap.distil(model, original, images, progress=poison, **SHORT)
    assert isinstance(caught.value, normswap.NormswapError)
    assert contents(model) == contents(good)
    assert model._normswap.history[-1].steps == 2


def test_a_learning_rate_far_too_large_leaves_a_finite_network(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(TrainingError, match=r"finite|nan|inf|weights"):
        normswap.distil(model, data=images, steps=6, batch_size=8, lr=1e25)
    assert all(p.isfinite().all() for p in model.parameters())


def test_nan_in_the_data_is_named(model: nn.Module, images: Tensor) -> None:
    images[:] = math.nan
    with pytest.raises(DataError, match="data holds NaN"):
        normswap.distil(model, data=images, **SHORT)


def test_an_interrupt_keeps_what_was_reached(original: nn.Module, model: nn.Module, images: Tensor) -> None:
    before = contents(model)
    with pytest.raises(KeyboardInterrupt) as caught:
        normswap.distil(model, original, images, progress=Stop(4, KeyboardInterrupt()), **SHORT)
    assert caught.value.report.interrupted
    assert (caught.value.report.steps, caught.value.report.planned) == (4, 6)
    assert contents(model) != before
    entry = model._normswap.history[-1]
    assert (entry.action, entry.steps, entry.planned) == ("distil", 4, 6)
    assert model(images).isfinite().all()


def test_an_interrupt_in_the_middle_of_an_update_undoes_that_update(
    original: nn.Module, model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        normswap.distil(good, original, images, progress=Stop(2, KeyboardInterrupt()), **SHORT)
    step, calls = torch.optim.AdamW.step, []

    def interrupted(self: Any, *args: Any) -> Any:
        calls.append(step(self, *args))
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(Interrupted):
        normswap.distil(model, original, images, checkpoint=tmp_path / "state.pt", **SHORT)
    assert contents(model) == contents(good)
    assert not list(tmp_path.iterdir())  # optimizer and weights do not belong together any more


def test_history_survives_saving(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    normswap.distil(model, data=images, **SHORT)
    normswap.save(model, tmp_path / "a.safetensors")
    assert normswap.checkpoint.manifest.read_manifest(tmp_path / "a.safetensors")["history"][-1]["action"] == "distil"
    with pytest.raises(RevertError):
        normswap.revert(model)
