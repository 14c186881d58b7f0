"""Folders of images: what is found, in which order, which of it is taken, and what is said when it cannot be used."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normswap.data.image_folder import ImageData, open_images
from normswap.data.preprocess import Preprocess
from normswap.errors import DataError, OptionError


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three classes of 6, 3 and 1 images, one of them nested, besides files that are no images."""
    for i in range(5):
        draw(tmp_path / "photos" / "b" / f"{i}.png", i)
    draw(tmp_path / "photos" / "b" / "more" / "5.JPG", 5)
    for i in range(3):
        draw(tmp_path / "photos" / "a" / f"{i}.png", 10 + i)
    draw(tmp_path / "photos" / "B" / "0.png", 20)
    (tmp_path / "photos" / "b" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / "a" / ".hidden.png").write_text("no image")
    (tmp_path / "photos" / ".cache").mkdir()
    return tmp_path / "photos"


def test_classes_are_numbered_as_torchvision_does(classes: Path) -> None:
    from torchvision.datasets import ImageFolder

    (classes / "a" / ".hidden.png").unlink()
    (classes / ".cache").rmdir()
    theirs = ImageFolder(classes)
    ours = open_images(classes)
    assert ours.labels is not None
    assert list(ours.classes or ()) == theirs.classes
    assert [(str(f), n) for f, n in zip(ours.files, ours.labels, strict=True)] == theirs.samples


def test_names_that_begin_with_a_dot_are_left_out(classes: Path) -> None:
    assert Counter(open_images(classes).labels) == {0: 1, 1: 3, 2: 6}


def test_images_alone_have_no_labels(tmp_path: Path) -> None:
    for name in ("2.png", "10.png", "1.bmp"):
        draw(tmp_path / name)
    (tmp_path / "empty folder").mkdir()
    data = open_images(tmp_path)
    assert [file.name for file in data.files] == ["1.bmp", "10.png", "2.png"]
    assert (data.labels, data.classes, data.found) == (None, None, 3)
    assert [labels for _, labels in data.batches(Preprocess())] == [None]


def test_batches_hold_the_pixels_and_labels_in_order(classes: Path) -> None:
    batches = open_images(classes).batches(Preprocess.raw(), 4)
    assert len(batches) == 3
    for _ in range(2):  # any number of times
        images, labels = zip(*batches, strict=True)
        assert [len(x) for x in images] == [4, 4, 2]
        assert torch.cat(labels).tolist() == [0] + [1] * 3 + [2] * 6
        third = np.asarray(Image.open(classes / "a" / "1.png")).transpose(2, 0, 1) / 255
        torch.testing.assert_close(images[0][2], torch.from_numpy(third).float())


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (3, 3), (6, 6), (8, 8), (10, 10), (99, 10)])
def test_a_limit_is_spread_evenly_over_the_classes(classes: Path, limit: int, expected: int) -> None:
    data = open_images(classes, limit=limit)
    counts = Counter(data.labels)
    assert (len(data), data.found) == (expected, 10)
    for name, available in ((0, 1), (1, 3), (2, 6)):  # no class is short while another has two more
        assert counts[name] == available or counts[name] >= max(counts.values()) - 1
    assert list(data.files) == sorted(data.files, key=open_images(classes).files.index)


def test_the_same_seed_takes_the_same_images(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.png").touch()
    chosen = [open_images(tmp_path, limit=10, seed=seed).files for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 10


def test_auto_size_is_decided_by_the_first_image(tmp_path: Path) -> None:
    draw(tmp_path / "0.png", size=(32, 32))
    draw(tmp_path / "1.png", size=(100, 80))
    ((images, _),) = open_images(tmp_path).batches()
    assert images.shape == (2, 3, 32, 32)


def test_images_of_different_sizes_come_as_a_list_or_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "0.png", size=(32, 30))
    draw(tmp_path / "1.png", size=(20, 10))
    data = open_images(tmp_path)
    ((images, _),) = data.batches(Preprocess.raw(), stack=False)
    assert [tuple(image.shape) for image in images] == [(3, 30, 32), (3, 10, 20)]
    with pytest.raises(DataError, match=r"0\.png is \(3, 30, 32\), 1\.png is \(3, 10, 20\)\n.*size=224"):
        list(data.batches(Preprocess.raw()))


def test_a_callable_gets_rgb_of_8_bits(tmp_path: Path) -> None:
    from torchvision.transforms.functional import pil_to_tensor

    Image.fromarray(np.full((4, 5), 65535, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("LA", (5, 4), (255, 0)).save(tmp_path / "alpha.png")
    ((images, _),) = open_images(tmp_path).batches(lambda picture: pil_to_tensor(picture).float())
    assert images.shape == (2, 3, 4, 5)
    assert images.min() == 255


def test_unreadable_images_are_counted_and_named(tmp_path: Path) -> None:
    for i in range(6):
        draw(tmp_path / "c" / f"{i}.png", size=(40, 40))
    (tmp_path / "c" / "1.png").write_bytes((tmp_path / "c" / "1.png").read_bytes()[:900])
    (tmp_path / "c" / "4.png").write_text("hello")
    (tmp_path / "c" / "5.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        list(open_images(tmp_path).batches(batch_size=1))
    text = str(caught.value)
    assert f"3 of 6 images in {tmp_path} cannot be read" in text
    for part in ("c/1.png: image file is truncated", "c/4.png: cannot identify image file\n", "c/5.png", "Remove"):
        assert part in text


def test_more_than_ten_unreadable_images_are_counted(tmp_path: Path) -> None:
    for i in range(13):
        (tmp_path / f"{i:02}.jpg").write_text("?")
    with pytest.raises(DataError, match=r"13 of 13 images(.*\n){11}  and 3 more"):
        list(open_images(tmp_path).batches())


def test_an_iteration_may_be_left_early(tmp_path: Path) -> None:
    for i in range(9):
        draw(tmp_path / f"{i}.png")
    assert len(next(iter(open_images(tmp_path).batches(Preprocess(), 2)))[0]) == 2


def test_a_failing_transform_is_told_apart_from_a_bad_image(tmp_path: Path) -> None:
    draw(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"transform failed on .*x\.png: ZeroDivisionError"):
        list(open_images(tmp_path).batches(lambda picture: 1 / 0))
    with pytest.raises(DataError, match=r"returned str for .*x\.png; expected a tensor"):
        list(open_images(tmp_path).batches(lambda picture: "no tensor"))


def test_what_is_no_folder_of_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="there is no image in"):
        open_images(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="there is no image in"):
        open_images(tmp_path)
    file = draw(tmp_path / "a" / "x.png")
    with pytest.raises(DataError, match=r"x\.png is a file, not a folder\nGive the folder that holds it"):
        open_images(file)
    draw(tmp_path / "y.png")
    with pytest.raises(DataError, match=r"both images \(1\) and folders of images \('a'\)"):
        open_images(tmp_path)


def test_an_empty_class_would_shift_the_labels(classes: Path) -> None:
    (classes / "ab").mkdir()
    with pytest.raises(DataError, match="class folders without any image: 'ab'"):
        open_images(classes)


@pytest.mark.parametrize("nested", [True, False])
def test_the_parts_of_a_data_set_are_no_classes(tmp_path: Path, nested: bool) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog") if nested else (".",):
            draw(tmp_path / part / name / "0.png")
    with pytest.raises(DataError, match="'train', 'val', which are parts of a data set") as caught:
        open_images(tmp_path)
    assert f"{tmp_path / 'train'} or {tmp_path / 'val'}" in str(caught.value)
    assert len(open_images(tmp_path / "val")) == 2 if nested else 1


def test_train_beside_other_classes_is_a_vehicle(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        draw(tmp_path / name / "0.png")
    assert open_images(tmp_path).classes == ("bus", "train")


@pytest.mark.parametrize("bad", [0, -1, 2.5, True])
def test_numbers_of_images_are_positive(tmp_path: Path, bad: int) -> None:
    draw(tmp_path / "0.png")
    with pytest.raises(OptionError, match="number of images"):
        open_images(tmp_path, limit=bad)
    with pytest.raises(OptionError, match="batch_size"):
        open_images(tmp_path).batches(batch_size=bad)


def test_says_what_it_found(classes: Path) -> None:
    assert str(open_images(classes, limit=4)) == f"{classes}: 4 of 10 images in 3 classes"
    assert str(ImageData(Path("x"), (), found=0)) == "x: 0 images, no labels"
