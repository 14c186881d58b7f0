"""Folders, data sets and the order of samples, as fine-tuning reads them."""

from __future__ import annotations

import random
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import normswap
from normswap.data.preprocess import Preprocess
from normswap.errors import DataError, OptionError
from normswap.finetuning.datasets.augmentation import Augmented, training_transform
from normswap.finetuning.datasets.labelled import open_sets, some_inputs, transformed
from normswap.finetuning.datasets.loader import Loader, Samples, Skipped
from normswap.finetuning.datasets.sampler import ResumableBatchSampler, ValidationSampler
from normswap.finetuning.datasets.splits import split
from normswap.finetuning.datasets.torchvision_named import from_torchvision
from normswap.training.seeding import mixed_seed

COLOURS = {"blue": (10, 20, 240), "green": (20, 230, 30), "red": (250, 20, 10)}


def paint(folder: Path, count: int = 4, classes: tuple[str, ...] = tuple(COLOURS), size: int = 12) -> Path:
    """`count` noisy pictures of each colour, in a subfolder of its name."""
    noise = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.clip(np.array(COLOURS[name]) + noise.normal(0, 25, (size, size, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def network(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, classes))


def train(folder: Path, **more: object) -> normswap.finetuning.output.report.FinetuneReport:
    return normswap.finetune(network(), folder, **{"batch_size": 2, "epochs": 2, "lr": 0.01, **more})


# --- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "size", "accumulate", "processes"), [(10, 2, 1, 1), (23, 2, 3, 2), (16, 1, 4, 4)])
def test_processes_share_an_epoch_without_overlap(samples: int, size: int, accumulate: int, processes: int) -> None:
    parts = [list(ResumableBatchSampler(samples, size, 5, accumulate, processes, rank)) for rank in range(processes)]
    seen = Counter(index for part in parts for batch in part for _, index in batch)
    width = size * accumulate * processes
    assert set(seen.values()) == {1}
    assert len(seen) == samples // width * width
    whole = list(ResumableBatchSampler(samples, size * processes, 5, accumulate))
    for step, batches in enumerate(zip(*parts, strict=True)):  # side by side they are one process's batch
        assert [key for batch in batches for key in batch] == whole[step]


def test_an_epoch_goes_on_from_any_step() -> None:
    order = ResumableBatchSampler(30, 2, 1, accumulate=2)
    order.start(3)
    whole = list(order)
    order.start(3, first=4)
    assert list(order) == whole[8:]
    assert len(order) == len(whole) - 8
    order.start(4)
    assert list(order) != whole


@pytest.mark.parametrize(("samples", "processes"), [(7, 1), (7, 2), (2, 3), (12, 5)])
def test_validation_counts_every_sample_once(samples: int, processes: int) -> None:
    samplers = [ValidationSampler(samples, 2, processes, rank) for rank in range(processes)]
    keys = [index for sampler in samplers for batch in sampler for _, index in batch]
    assert sorted(keys) == list(range(samples))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


def test_a_split_takes_a_tenth_of_every_class_and_is_always_the_same() -> None:
    labels = [0] * 40 + [1] * 20 + [2] * 3 + [3]
    kept, held = split(len(labels), seed=1, labels=labels)
    assert Counter(labels[i] for i in held) == {0: 4, 1: 2, 2: 1}
    assert sorted(kept + held) == list(range(len(labels)))
    assert split(len(labels), seed=1, labels=labels) == (kept, held)
    assert split(len(labels), seed=2, labels=labels) != (kept, held)


# --- random changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_is_a_function_of_seed_epoch_and_index(tmp_path: Path, workers: int) -> None:
    sets = transformed(open_sets(paint(tmp_path)), Augmented(Preprocess()), Preprocess())

    def read(seed: int, epoch: int) -> dict[int, Tensor]:
        order = ResumableBatchSampler(len(sets.train), 3, 0)
        order.start(epoch)
        loader = Loader(Samples(sets.train, list, seed=seed, replace=True), order, workers, Skipped(0), pin=False)
        torch.manual_seed(random.randrange(1000))
        keys = [index for batch in order for _, index in batch]
        return dict(zip(keys, [image for batch in loader for image, _ in batch.content], strict=True))

    first, again, other = read(0, 1), read(0, 1), read(0, 2)
    assert all(torch.equal(first[i], again[i]) for i in first)
    assert any(not torch.equal(first[i], other[i]) for i in first)


def test_drawing_leaves_the_callers_random_state(tmp_path: Path) -> None:
    sets = transformed(open_sets(paint(tmp_path)), Augmented(Preprocess()), Preprocess())
    before = torch.get_rng_state()
    Samples(sets.train, list, seed=0, replace=True).__getitems__([(0, 1)])
    assert torch.equal(before, torch.get_rng_state())


def test_small_pictures_are_shifted_and_mirrored_only() -> None:
    pixels = torch.randint(0, 255, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image, plain = Image.fromarray(pixels.numpy()), Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3)
    whole = plain(image)
    padded = torch.nn.functional.pad(whole[None], (2, 2, 2, 2), mode="reflect")[0]
    windows = [padded[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    windows += [window.flip(2) for window in windows]
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        out = Augmented(plain)(image)
        found = [i for i, window in enumerate(windows) if torch.equal(window, out)]
        assert found, "no shift of the picture"
        seen.add(found[0])
    assert len(seen) > 10


@pytest.mark.parametrize(("augment", "size"), [("auto", 224), ("flip", 224), ("none", 224), ("auto", 32)])
def test_pictures_of_any_mode_come_out_at_one_size(augment: str, size: int) -> None:
    transform = training_transform(Preprocess(size=size), augment)
    for mode in ("RGB", "L", "RGBA", "P", "I;16", "1", "CMYK"):
        x = transform(Image.new(mode, (300, 120)))
        assert x.shape == (3, size, size)
        assert x.dtype == torch.float32


def test_a_librarys_transform_gets_rgb() -> None:
    from torchvision.transforms import v2

    theirs = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    assert training_transform(theirs, "auto")(Image.new("L", (8, 8))).shape == (3, 8, 8)


# --- folders --------------------------------------------------------------------------------------------------------


def test_train_and_val_folders_are_taken(tmp_path: Path) -> None:
    paint(tmp_path / "train", 3)
    paint(tmp_path / "val", 2)
    sets = open_sets(tmp_path)
    assert (len(sets.train), len(sets.validation)) == (9, 6)
    assert sets.classes == ("blue", "green", "red")
    assert sets.note == ""
    assert train(tmp_path, epochs=15).figures["val_accuracy"] == 1.0


def test_a_test_folder_in_place_of_val_is_said(tmp_path: Path) -> None:
    paint(tmp_path / "train", 3)
    paint(tmp_path / "test", 2)
    assert "test" in open_sets(tmp_path).note


def test_labels_of_val_are_those_of_train(tmp_path: Path) -> None:
    paint(tmp_path / "train", 2)
    paint(tmp_path / "val", 2, ("red",))
    assert set(open_sets(tmp_path).validation.labels) == {2}


def test_a_folder_without_val_is_split_and_says_so(tmp_path: Path) -> None:
    sets = open_sets(paint(tmp_path, 20), seed=3)
    assert (len(sets.train), len(sets.validation)) == (54, 6)
    assert "6 of the 60 images" in sets.note
    assert "seed 3" in sets.note
    assert not set(sets.train.files) & set(sets.validation.files)


def test_a_class_of_val_that_train_lacks_is_named(tmp_path: Path) -> None:
    paint(tmp_path / "train", 2, ("red", "green"))
    paint(tmp_path / "val", 2)
    with pytest.raises(DataError, match="'blue'"):
        open_sets(tmp_path)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="single class, 'red'"):
        open_sets(paint(tmp_path, 3, ("red",)))


@pytest.mark.parametrize("kind", ["missing", "empty", "flat", "file"])
def test_a_folder_that_is_none_is_explained(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    if kind != "missing":
        folder.mkdir()
    if kind == "flat":
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    if kind == "file":
        folder = folder / "a.txt"
        folder.write_text("x")
    with pytest.raises(DataError, match=str(folder)):
        open_sets(folder)


def test_pictures_of_odd_modes_train(tmp_path: Path) -> None:
    paint(tmp_path, 2)
    Image.new("I;16", (12, 12), 40_000).save(tmp_path / "red" / "deep.png")
    Image.new("L", (12, 12), 100).save(tmp_path / "blue" / "grey.png")
    Image.new("RGBA", (12, 12), (0, 200, 0, 90)).save(tmp_path / "green" / "alpha.png")
    assert train(tmp_path).bad == ()


def test_unreadable_pictures_are_skipped_and_named(tmp_path: Path) -> None:
    paint(tmp_path / "train", 6)
    paint(tmp_path / "val", 3)
    whole = (tmp_path / "train" / "red" / "0.png").read_bytes()
    (tmp_path / "train" / "red" / "0.png").write_bytes(whole[:60])
    (tmp_path / "val" / "blue" / "1.png").write_bytes(b"no picture")
    report = train(tmp_path)
    assert len(report.bad) == 2
    assert any(bad.startswith("train/red/0.png: ") for bad in report.bad)
    assert report.steps == 18  # batches kept their size


def test_too_many_unreadable_pictures_are_an_error(tmp_path: Path) -> None:
    paint(tmp_path / "train", 6)
    paint(tmp_path / "val", 1)
    for i in range(4):
        (tmp_path / "train" / "red" / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"red/3\.png") as error:
        train(tmp_path, max_bad=3, epochs=5)
    assert "4 images cannot be read" in str(error.value)
    assert "max_bad=" in str(error.value)


def test_pictures_of_different_sizes_are_brought_to_one(tmp_path: Path) -> None:
    paint(tmp_path, 4, size=12)
    paint(tmp_path / "red", 1, ("red",), size=20)
    assert train(tmp_path).steps > 0


def test_pictures_of_different_sizes_at_native_size_are_explained(tmp_path: Path) -> None:
    paint(tmp_path, 4, size=12)
    Image.new("RGB", (20, 20)).save(tmp_path / "red" / "large.png")
    with pytest.raises(DataError, match="size=224"):
        train(tmp_path, preprocess=Preprocess(size="native"), augment="none", epochs=9)


def test_the_head_follows_the_folder(tmp_path: Path) -> None:
    paint(tmp_path, 4)
    model = network(classes=10)
    normswap.finetune(model, tmp_path, batch_size=2, steps=2)
    assert model[-1].out_features == 3


def test_more_classes_than_asked_for_is_an_error(tmp_path: Path) -> None:
    paint(tmp_path, 4)
    with pytest.raises(OptionError, match="3 classes"):
        normswap.finetune(network(10), tmp_path, batch_size=2, steps=2, num_classes=2)


def test_workers_read_the_same(tmp_path: Path) -> None:
    paint(tmp_path, 8)
    models = [network(), network()]
    for workers, model in zip((0, 2), models, strict=True):
        normswap.finetune(model, tmp_path, batch_size=2, epochs=2, lr=0.01, workers=workers)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_calibration_inputs_are_spread_over_the_set(tmp_path: Path) -> None:
    sets = open_sets(paint(tmp_path, 8))
    batches = list(some_inputs(sets, Preprocess(), 6, 4))
    assert [len(batch) for batch in batches] == [4, 2]
    means = torch.cat(batches).mean((2, 3)).argmax(1)
    assert len(set(means.tolist())) == 3


def test_a_run_begun_before_goes_on_in_the_same_order() -> None:
    order = ResumableBatchSampler(samples=9, size=3, seed=7)
    order.start(epoch=4)
    generator = torch.Generator().manual_seed((7 * 0x9E3779B1 + 4) % 2**63)
    assert [index for batch in order for _, index in batch] == torch.randperm(9, generator=generator).tolist()
    assert mixed_seed(7, 4, 5) == (7 * 0x9E3779B1 + 4 * 0x85EBCA77 + 5 * 0xC2B2AE3D + 1) % 2**63


# --- torchvision's data sets ----------------------------------------------------------------------------------------


def test_a_torchvision_set_with_parts_is_taken_by_name(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 6)):
        pixels = bytes(range(256)) * (28 * 28 * count // 256 + 1)
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels[: 28 * 28 * count])
        labels = bytes(i % 10 for i in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)
    sets = from_torchvision("mnist", tmp_path, download=False, seed=0)
    assert (len(sets.train), len(sets.validation)) == (20, 6)
    assert sets.count == 10
    assert sets.train[3][1] == 3
    sets = transformed(sets, Augmented(Preprocess()), Preprocess())
    assert sets.train[0][0].shape == (3, 28, 28)


def test_a_torchvision_set_without_parts_is_split(tmp_path: Path) -> None:
    sets = from_torchvision("FakeData", tmp_path, download=False, seed=0)
    assert "held back" in sets.note
    assert len(sets.train) + len(sets.validation) == 1000


def test_an_unknown_or_missing_torchvision_set_is_explained(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="CIFAR10"):
        from_torchvision("CIFAR11", tmp_path, download=False, seed=0)
    with pytest.raises(DataError, match="download=True"):
        from_torchvision("CIFAR10", tmp_path, download=False, seed=0)
