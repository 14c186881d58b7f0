"""What the machine cannot take is refused before anything is loaded."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from normswap.distillation.settings import Settings as Distillation
from normswap.errors import OptionError
from normswap.finetuning.settings import RunOptions
from normswap.finetuning.settings import Settings as Finetuning
from normswap.finetuning.tasks.head import fitted
from normswap.heads.classifier import Head
from normswap.machine import limits


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores and 8 GiB."""
    monkeypatch.setattr(limits, "cores", lambda: 4)
    monkeypatch.setattr(limits, "free_memory", lambda: 8.0 * 2**30)


def test_more_workers_than_the_cores_keep_busy_are_refused() -> None:
    assert RunOptions(workers=16).workers == 16
    with pytest.raises(OptionError, match="1000 worker processes on 4 cores") as caught:
        RunOptions(workers=1000)
    assert "workers=4" in str(caught.value)


def test_more_workers_than_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "free_memory", lambda: 2.0**30)
    with pytest.raises(OptionError, match=r"16 worker processes would need 3\.12 GiB of memory, and 1 GiB are free"):
        limits.check_workers(16)


def test_images_of_which_no_batch_fits_are_refused() -> None:
    """An image of 10,000 x 10,000 takes 1.2 GB, and as much in its batch."""
    limits.check_images(10_000, 10_000)
    with pytest.raises(OptionError, match="a batch of 4 images of 10000x10000 pixels"):
        limits.check_images(10_000, 10_000, 4)
    with pytest.raises(OptionError, match="an image of 100000x100000 pixels would need 224 GiB"):
        limits.check_images(100_000, 100_000)


def test_a_head_that_cannot_be_trained_in_memory_is_refused_before_it_is_built() -> None:
    """64 inputs and a bias, in float32, four times over: 1040 bytes a class."""
    model = nn.Sequential(nn.Linear(64, 3))
    assert fitted(model, Head("0", 3), None, 1000, 0).classes == 1000
    with pytest.raises(OptionError, match=r"a head for 10000000 classes would need 9.69 GiB"):
        fitted(model, Head("0", 1000), None, 10**7, 0)
    assert model[0].out_features == 1000


@pytest.mark.parametrize("settings", [Distillation, Finetuning])
def test_a_seed_that_torch_does_not_take_is_refused(settings: type) -> None:
    counts = ("steps", "batch_size", "accumulate", "processes", "samples")
    fields = {field.name: 1 if field.name in counts else None for field in dataclasses.fields(settings)}
    with pytest.raises(OptionError, match="seed must be an integer from 0 to 4294967295"):
        settings(**(fields | {"seed": 10**23}))
