from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from normswap.demo import digits, network, story

TIE = 2 / 597
"""Two held-out digits more or less are a tie."""


def test_the_package_holds_1797_digits() -> None:
    every = digits.load()
    assert every.images.shape == (1797, 1, 8, 8)
    assert every.labels.shape == (1797,)
    assert (every.images.min(), every.images.max()) == (0, 1)
    assert every.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as UCI lists them


def test_the_digits_are_the_file_that_the_notice_names() -> None:
    notice = (Path(digits.__file__).parent / "NOTICE.md").read_text("utf-8")
    assert hashlib.sha256(digits.FILE.read_bytes()).hexdigest() in notice
    assert "CC BY 4.0" in notice


def test_no_held_out_digit_is_trained_on() -> None:
    training, held_out = digits.split()
    assert (len(training), len(held_out)) == (1200, 597)
    seen = {image.numpy().tobytes() for image in training.images}
    assert not any(image.numpy().tobytes() in seen for image in held_out.images)


def test_the_network_is_small_and_knows_the_digits() -> None:
    assert network.WEIGHTS.stat().st_size < 400_000
    assert digits.FILE.stat().st_size < 70_000
    model = network.pretrained()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 12
    assert story.accuracy(model, digits.split()[1]) > 0.98


def test_each_step_keeps_at_least_what_the_one_before_kept() -> None:
    told = story.tell(distil_steps=40, finetune_steps=0)
    original, copied, folded, calibrated, distilled = (method.accuracy for method in told.methods)
    assert copied < 0.5
    assert folded > copied + 0.3
    assert calibrated > folded - TIE
    assert distilled > calibrated - TIE
    assert distilled > original - 2 * TIE


@pytest.mark.slow
def test_group_norm_learns_from_batches_of_one_digit_and_batch_norm_does_not() -> None:
    told = story.tell(distil_steps=1, finetune_steps=120)
    after = {(curve.norm, curve.batches): curve.accuracy[-1] for curve in told.curves}
    assert after["gn", "same digit"] > after["bn", "same digit"] + 0.15
    assert after["gn", "mixed"] > 0.5
    assert after["bn", "mixed"] > 0.4
    assert all(curve.steps[0] == 0 and curve.steps[-1] == 120 for curve in told.curves)


def test_both_norms_are_trained_on_the_same_images() -> None:
    labels = torch.arange(1000) % 10
    for same in (False, True):
        first, again = (story._batches(labels, 5, same_digit=same, seed=3) for _ in range(2))
        assert torch.equal(torch.stack(first), torch.stack(again))
    assert all(labels[pair[0]] == labels[pair[1]] for pair in story._batches(labels, 50, same_digit=True, seed=0))
