"""`normswap.finetune` on the real digits network: what goes wrong, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuned import SMALL, changed, tensors
from torch import Tensor, nn

import normswap
from normswap.demo.network import pretrained
from normswap.errors import DataError, OptionError, TrainingError
from normswap.finetuning.engine.optimizer import default_rate

# --- trouble --------------------------------------------------------------------------------------------------------


class Poisoned(torch.utils.data.Dataset):
    """NaN in one sample."""

    def __init__(self, data: tuple[Tensor, Tensor], index: int) -> None:
        self.data, self.index = data, index

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.data[0][i] * (math.nan if i == self.index else 1.0), int(self.data[1][i])


def test_a_loss_that_is_not_finite_names_step_and_checkpoint(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    before = tensors(gn)
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d+; the last good checkpoint is .*state.pt"):
        normswap.finetune(gn, Poisoned(data[0], 7), batch_size=2, epochs=1, output=tmp_path)
    assert not changed(gn, before)  # that of the last checkpoint, the start
    assert all(bool(t.isfinite().all()) for t in gn.state_dict().values())


def test_without_a_folder_the_network_goes_back_too(gn: nn.Module, data: Any) -> None:
    before = tensors(gn)
    with pytest.raises(TrainingError, match="the network is as it was before"):
        normswap.finetune(gn, Poisoned(data[0], 7), batch_size=2, epochs=1)
    assert not changed(gn, before)


def test_labels_beyond_the_scores_name_the_head(gn: nn.Module, data: Any) -> None:
    (x, y), _ = data
    with pytest.raises(DataError, match="num_classes="):
        normswap.finetune(gn, (x, y + 5), **SMALL)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"epochs": 1, "steps": 1}, "exclude each other"),
        ({"epochs": 0}, "epochs"),
        ({"clip_grad": 0.0}, "clip_grad"),
        ({"distil": 1.5}, "distil"),
        ({"ema": 1.0}, "ema"),
        ({"train": "layer9.*"}, "layer9"),
        ({"device": "gpu"}, "device"),
        ({"precision": "fp8"}, "precision"),
        ({"precision": "fp16", "device": "cpu"}, "fp16"),
        ({"augment": "mixup"}, "augment"),
        ({"workers": -1}, "workers"),
        ({"num_classes": 1}, "num_classes"),
        ({"resume": True}, "output"),
        ({"freeze_stats": True}, "running statistics"),
        ({"batch_size": 41}, "fewer than a step takes"),
    ],
)
def test_a_wrong_argument_changes_nothing(gn: nn.Module, data: Any, wrong: dict[str, Any], words: str) -> None:
    before, modes = tensors(gn), [m.training for m in gn.modules()]
    with pytest.raises(normswap.NormswapError, match=words):
        normswap.finetune(gn, data[0], **{"batch_size": 2, **wrong})
    assert not changed(gn, before)
    assert modes == [m.training for m in gn.modules()]


@pytest.mark.parametrize(
    "data",
    [iter([1]), {"x": 1}, (torch.ones(3, 1, 8, 8), torch.ones(2)), (torch.ones(0, 1, 8, 8), torch.ones(0)), 5, []],
    ids=lambda value: type(value).__name__,
)
def test_data_that_cannot_be_used_is_named(gn: nn.Module, data: Any) -> None:
    with pytest.raises(DataError):
        normswap.finetune(gn, data, **SMALL)


def test_a_network_without_scores_is_refused(data: Any) -> None:
    model = normswap.convert(pretrained(), "gn", groups=4).blocks
    with pytest.raises(OptionError, match="scores"):
        normswap.finetune(model, (torch.randn(4, 16, 8, 8), torch.zeros(4, dtype=torch.long)), batch_size=2, steps=1)


def test_the_default_rate_grows_with_the_batch() -> None:
    assert default_rate("adamw", 8) == pytest.approx(2 * default_rate("adamw", 2))
    assert default_rate("sgd", 8) == pytest.approx(4 * default_rate("sgd", 2))


# --- what strangers tried -------------------------------------------------------------------------------------------


def test_a_run_is_replaced_only_when_the_new_one_has_begun(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    normswap.finetune(gn, data[0], **SMALL, output=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for wrong in ({"freeze_stats": True}, {"train": "nowhere"}, {"num_classes": 2}):
        with pytest.raises(normswap.NormswapError):
            normswap.finetune(gn, data[0], **SMALL, output=tmp_path, overwrite=True, **wrong)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert gn.classifier.out_features == 10


def test_bad_data_in_the_middle_loses_nothing(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    class OddLabel(Poisoned):
        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return self.data[0][i], 99 if i == self.index else int(self.data[1][i])

    with pytest.raises(DataError, match=r"label 99.*the last good checkpoint is .*, of step \d+"):
        normswap.finetune(gn, OddLabel(data[0], 7), batch_size=2, epochs=1, output=tmp_path)
    report = normswap.finetune(gn, data[0], batch_size=2, epochs=1, output=tmp_path / "other")
    order = torch.load(tmp_path / "state.pt", weights_only=True)
    assert 0 < order["step"] < report.steps


@pytest.mark.parametrize("labels", [torch.rand(40) * 3, torch.full((40,), -1)], ids=["floating", "negative"])
def test_labels_that_are_none_are_refused(gn: nn.Module, data: Any, labels: Tensor) -> None:
    with pytest.raises(DataError, match="whole numbers from 0"):
        normswap.finetune(gn, (data[0][0], labels), **SMALL)


def test_arrays_train_and_wrong_kinds_are_explained(gn: nn.Module, data: Any) -> None:
    (x, y), _ = data
    assert normswap.finetune(gn, (x.numpy(), y.numpy()), **SMALL).steps == 10
    for inputs, words in ((x.byte(), "uint8"), (x.double(), "float64")):
        with pytest.raises(DataError, match=words):
            normswap.finetune(gn, (inputs, y), **SMALL)
    for samples, words in (([(x[0], 1, 2)], "pair"), ([("a", 1)], "not a tensor"), ([(x[0], 1.5)], "whole numbers")):
        with pytest.raises(DataError, match=words):
            normswap.finetune(gn, samples * 4, **SMALL)


def test_training_ignores_that_gradients_are_switched_off(gn: nn.Module, data: Any) -> None:
    before = tensors(gn)
    with torch.no_grad():
        normswap.finetune(gn, data[0], **SMALL)
    assert changed(gn, before)


def test_what_the_user_froze_stays_frozen_and_is_reported(data: Any) -> None:
    model = normswap.freeze(pretrained(), affine=False)
    report = normswap.finetune(model, data[0], **SMALL)
    assert list(report.notes) == ["12 frozen layers: nothing moved"]  # and no word on small batches
    assert normswap.frozen_drift(model).largest == 0


def test_memory_that_runs_out_says_what_to_try(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    class Hungry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms, self.calls = gn, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            if self.calls > 5:
                torch.empty(2**58)
            return self.norms(x)

    model = Hungry()
    with pytest.raises(TrainingError, match="step 6 does not fit into the memory") as error:
        normswap.finetune(model, data[0], **SMALL)
    assert "batch_size" in str(error.value)
    assert "step 5" in str(error.value)
