"""Mixup, CutMix, RandAugment: what they make of pictures and labels, where they do not fit, and going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetuned import changed, stop_at, tensors
from PIL import Image
from torch import nn

import normswap
from normswap.data.preprocess import Preprocess
from normswap.demo.network import pretrained
from normswap.errors import Interrupted, OptionError
from normswap.finetuning.datasets.augmentation import training_transform
from normswap.finetuning.datasets.mixing import Mixing
from normswap.finetuning.finetune import task_of
from normswap.finetuning.tasks.classification import Classification

SCALE = 1.0 / 29


def fresh() -> nn.Module:
    return normswap.convert(pretrained(), "gn", groups=4)


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.5), Mixing(cutmix=1.0), Mixing(0.5, 1.0)])
def test_labels_are_mixed_as_the_pictures_are(mixing: Mixing) -> None:
    batch = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 6, 8).contiguous()  # each picture is its number
    seen = set()
    for _ in range(12):
        mixed, shares = mixing(batch)
        assert mixed.shape == batch.shape
        torch.testing.assert_close(shares.sum(1), torch.ones(5))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), shares @ torch.arange(5.0))  # its mean is as the shares say
        torch.testing.assert_close(shares.diagonal(), shares[0, 0].expand(5))
        seen.add(bool((mixed == mixed.round()).all()))  # CutMix pastes, mixup blends
    assert seen == ({True, False} if mixing.mixup and mixing.cutmix else {mixing.mixup is None})


def test_the_loss_is_that_of_both_labels_by_their_shares() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])
    torch.manual_seed(5)
    mixed, shares = Mixing(mixup=0.8)(x)
    share = float(shares[0, 0])
    expected = share * nn.functional.cross_entropy(net(mixed), y)
    expected = expected + (1 - share) * nn.functional.cross_entropy(net(mixed), y.roll(1))
    torch.manual_seed(5)
    outcome = Classification(mixing=Mixing(mixup=0.8)).outcome(net, (x, y))
    torch.testing.assert_close(outcome.loss, expected)
    larger = y if share > 0.5 else y.roll(1)
    assert int(outcome.sums["accuracy"]) == int((net(mixed).argmax(1) == larger).sum())


@pytest.mark.usefixtures("every_step")
def test_a_stopped_run_that_mixes_goes_on_bit_for_bit(data: Any, tmp_path: Path) -> None:
    said = {"batch_size": 4, "epochs": 2, "lr": 1e-3, "device": "cpu", "mixup": 0.4, "cutmix": 1.0}
    whole, cut, plain = fresh(), fresh(), fresh()
    normswap.finetune(whole, *data, **said)
    for step in (3, 14):
        with pytest.raises(Interrupted):
            normswap.finetune(cut, *data, **said, output=tmp_path, progress=stop_at(step), resume=step > 3)
        cut = fresh()
    normswap.finetune(cut, *data, **said, output=tmp_path, resume=True)
    assert not changed(cut, tensors(whole))
    normswap.finetune(plain, *data, **(said | {"mixup": 0, "cutmix": None}))
    assert changed(plain, tensors(whole))
    with pytest.raises(OptionError, match="cutmix"):
        normswap.finetune(fresh(), *data, **(said | {"cutmix": None}), output=tmp_path, resume=True)


def photos(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    for label in range(4):
        (folder / str(label)).mkdir(parents=True)
        for i in range(3):
            pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / str(label) / f"{i}.png")
    return folder


def colours() -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 4))


@pytest.mark.usefixtures("every_step")
def test_a_stopped_run_with_random_changes_goes_on_bit_for_bit(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    said = {"epochs": 3, "lr": 1e-2, "device": "cpu", "rand_augment": 2, "preprocess": Preprocess(size=12)}
    whole, cut, plain = colours(), colours(), colours()
    normswap.finetune(whole, folder, **said)
    with pytest.raises(Interrupted):
        normswap.finetune(cut, folder, **said, output=tmp_path / "run", progress=stop_at(6))
    cut = colours()
    normswap.finetune(cut, folder, **said, output=tmp_path / "run", resume=True)
    assert not changed(cut, tensors(whole))
    normswap.finetune(plain, folder, **(said | {"rand_augment": None}))
    assert changed(plain, tensors(whole))


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "F"])
@pytest.mark.parametrize("augment", ["auto", "flip", "none"])
def test_random_changes_take_pictures_of_any_depth(mode: str, augment: str) -> None:
    grey = torch.linspace(0, 1, 20 * 24).view(20, 24).numpy()
    picture = {
        "L": lambda: Image.fromarray((grey * 255).astype("uint8")),
        "RGB": lambda: Image.fromarray((grey * 255).astype("uint8")).convert("RGB"),
        "I;16": lambda: Image.fromarray((grey * 65535).astype("uint16")),
        "F": lambda: Image.fromarray(grey),
    }[mode]()
    transform = training_transform(Preprocess(size=16), augment, 3)
    found = [transform(picture) for _ in range(20)]
    plain = training_transform(Preprocess(size=16), "none")(picture)
    assert all(each.shape == plain.shape and bool(each.isfinite().all()) for each in found)
    assert len({float(each.double().sum()) for each in found}) > 10


def test_what_they_do_not_fit_is_refused_in_a_sentence(data: Any) -> None:
    for task in ("detection", "segmentation"):
        for option in ({"mixup": 0.2}, {"cutmix": 1.0}, {"rand_augment": 2}):
            with pytest.raises(OptionError, match=f"{next(iter(option))} goes with classification, not with {task}"):
                task_of(task, **option)
    x, y = data[0]
    flat = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    for model, inputs, said, words in (
        (fresh(), x, {"mixup": 0.2, "batch_size": 1}, "batches have a single one"),
        (fresh(), x, {"rand_augment": 2}, "changes pictures in files, and the data is Tensors"),
        (flat, x.flatten(1), {"cutmix": 1.0}, "cutmix mixes pictures"),
        (fresh(), x, {"mixup": -1.0}, "mixup"),
        (fresh(), x, {"rand_augment": 0}, "rand_augment"),
    ):
        with pytest.raises(OptionError, match=words):
            normswap.finetune(model, (inputs, y), steps=1, device="cpu", **said)  # type: ignore[arg-type]
