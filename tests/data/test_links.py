"""Folders with symbolic links: each real folder is read once, and no file is trained on and validated on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from normswap.data.decoding import Unreadable, decode
from normswap.data.image_folder import open_images
from normswap.errors import DataError
from normswap.finetuning.datasets.labelled import open_sets
from normswap.finetuning.datasets.masks import open_mask_sets
from normswap.finetuning.datasets.splits import split

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")


def paint(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    paint(tmp_path / "photos" / "cat")
    paint(tmp_path / "photos" / "dog")
    return tmp_path / "photos"


def listed(folder: Path) -> list[tuple[str, int]]:
    data = open_images(folder)
    assert data.labels is not None
    return [(str(file.relative_to(folder)), label) for file, label in zip(data.files, data.labels, strict=True)]


@pytest.mark.parametrize("place", ["all", "cat/all", "cat/deep/all"])
@pytest.mark.parametrize("target", [".", "cat", ".."])
def test_a_folder_that_contains_itself_is_read_once(photos: Path, place: str, target: str) -> None:
    """Or a folder above it, or one of its classes: a link in a class that leads to another class adds nothing."""
    before = listed(photos)
    link = photos / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to((photos / target).resolve(), target_is_directory=True)
    if (place, target) == ("all", "cat"):
        with pytest.raises(DataError, match="'all' and 'cat', which are one and the same folder"):
            open_images(photos)
    elif (place, target) == ("all", ".."):  # a class of its own, but for what is in the others
        with pytest.raises(DataError, match="class folders without any image: 'all'"):
            open_images(photos)
    else:
        assert listed(photos) == before


def test_two_classes_that_are_one_folder_are_named(photos: Path) -> None:
    (photos / "feline").symlink_to(photos / "cat", target_is_directory=True)
    with pytest.raises(DataError, match="'cat' and 'feline', which are one and the same folder"):
        open_images(photos)


def test_links_to_other_folders_are_followed_and_real_paths_go_first(photos: Path, tmp_path: Path) -> None:
    paint(tmp_path / "more", 2)
    paint(photos / "cat" / "z", 1)
    (photos / "cat" / "a").symlink_to(photos / "cat" / "z", target_is_directory=True)
    (photos / "cat" / "b").symlink_to(tmp_path / "more", target_is_directory=True)
    (photos / "cat" / "c").symlink_to(tmp_path / "more", target_is_directory=True)
    (photos / "fox").symlink_to(paint(tmp_path / "elsewhere", 1), target_is_directory=True)
    names = [name for name, _ in listed(photos)]
    assert names[4:7] == ["cat/b/0.png", "cat/b/1.png", "cat/z/0.png"]
    assert names[-1] == "fox/0.png"
    assert len(names) == 4 + 3 + 4 + 1


def test_a_file_that_is_there_several_times_is_on_one_side_of_the_split(photos: Path) -> None:
    for i in range(4):
        (photos / "cat" / f"again{i}.png").symlink_to(photos / "cat" / f"{i}.png")
        os.link(photos / "dog" / f"{i}.png", photos / "dog" / f"again{i}.png")
    paint(photos / "fox", 6)
    for seed in range(5):
        sets = open_sets(photos, seed=seed)
        train, held = ({os.stat(f).st_ino for f in part.files} for part in (sets.train, sets.validation))
        assert held
        assert not train & held
        assert len(sets.train) + len(sets.validation) == 22


def test_without_links_the_split_is_what_it_was(photos: Path) -> None:
    files = open_images(photos).files
    assert split(8, 3, [0] * 4 + [1] * 4, files) == split(8, 3, [0] * 4 + [1] * 4)


def test_validation_on_training_images_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(photos, target_is_directory=True)
    paint(tmp_path / "data" / "val" / "cat", 1)
    open_sets(tmp_path / "data")
    (tmp_path / "data" / "val" / "cat" / "link.png").symlink_to(photos / "cat" / "2.png")
    with pytest.raises(DataError, match=r"1 of the 2 validation images are training images too:\n.*link\.png"):
        open_sets(tmp_path / "data")
    with pytest.raises(DataError, match="8 of the 8 validation images"):
        open_sets(photos, photos)


def test_masks_of_training_images_do_not_validate_either(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        Image.new("L", (8, 8), 1).save(tmp_path / f"{name}_mask.png")
    with pytest.raises(DataError, match="2 of the 2 validation images"):
        open_mask_sets(tmp_path, tmp_path)


@pytest.mark.parametrize("to", ["b.png", "a.png", "nowhere.png"])
def test_a_link_that_leads_nowhere_or_in_a_circle_is_one_unreadable_image(tmp_path: Path, to: str) -> None:
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    (tmp_path / "a.png").symlink_to(to)
    (tmp_path / "b.png").symlink_to("a.png" if to != "nowhere.png" else "0.png")
    assert "a.png" in [file.name for file in open_images(tmp_path).files]
    with pytest.raises(Unreadable, match=r"^(Too many levels of symbolic links|No such file or directory)$"):
        decode(tmp_path / "a.png")
