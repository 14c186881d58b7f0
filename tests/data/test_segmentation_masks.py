"""Folders of images and class masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normswap.data import open_masks
from normswap.errors import DataError


def picture(path: Path, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


def mask(path: Path, values: list[list[int]], palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(values, dtype=np.uint8))
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


VALUES = [[0, 1, 2, 255, 0, 0]] * 4


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_masks(folder)
    return str(caught.value)


@pytest.mark.parametrize("names", [("images/a.jpg", "masks/a.png"), ("a.jpg", "a_mask.png")])
@pytest.mark.parametrize("palette", [False, True])
def test_pixels_are_classes_in_both_layouts_with_and_without_a_palette(
    tmp_path: Path, names: tuple[str, str], palette: bool
) -> None:
    picture(tmp_path / names[0])
    mask(tmp_path / names[1], VALUES, palette)
    data = open_masks(tmp_path)
    image, classes = data[0]
    assert (image.shape, image.dtype) == ((3, 4, 6), torch.float32)
    assert classes.dtype == torch.int64
    assert classes.tolist() == VALUES
    assert data.count_classes() == 3
    assert len(data) == 1


def test_images_are_sorted_and_hidden_files_left_out(tmp_path: Path) -> None:
    for name in ("b", "a", ".c"):
        picture(tmp_path / f"{name}.png")
        mask(tmp_path / f"{name}_mask.png", VALUES)
    assert [file.name for file in open_masks(tmp_path).files] == ["a.png", "b.png"]


def test_what_has_no_counterpart_is_counted_and_named(tmp_path: Path) -> None:
    for i in range(12):
        picture(tmp_path / f"{i:02}.png")
    message = refused(tmp_path)
    assert "12 images have no mask:\n  00.png" in message
    assert "and 2 more" in message
    for file in tmp_path.iterdir():
        file.rename(file.with_name(f"{file.stem}_mask.png"))
    assert "12 masks have no image" in refused(tmp_path)


def test_pairs_of_different_sizes_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (6, 5))
    mask(tmp_path / "a_mask.png", VALUES)
    assert "a.png is 6 x 5, its mask a_mask.png 6 x 4" in refused(tmp_path)


def test_a_mask_in_colour_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "a_mask.png")
    assert "a_mask.png is in colour (RGB)" in refused(tmp_path)


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a_mask.png").write_bytes(b"nothing")
    assert "a_mask.png: cannot identify image file" in refused(tmp_path)


def test_a_file_that_is_cut_short_is_named_when_it_is_read(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (64, 64))
    Image.fromarray(np.random.default_rng(0).integers(0, 5, (64, 64), dtype=np.uint8)).save(tmp_path / "a_mask.png")
    whole = (tmp_path / "a_mask.png").read_bytes()
    (tmp_path / "a_mask.png").write_bytes(whole[: len(whole) // 2])
    data = open_masks(tmp_path)
    with pytest.raises(DataError, match=r"a_mask\.png cannot be read"):
        data[0]
    with pytest.raises(DataError, match=r"1 masks cannot be read:\n  a_mask\.png"):
        data.count_classes()


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "a.jpg")
    mask(tmp_path / "a_mask.png", VALUES)
    assert "have the same name" in refused(tmp_path)


def test_an_empty_or_missing_folder_is_said_with_the_layouts(tmp_path: Path) -> None:
    assert "no images with masks" in refused(tmp_path)
    message = refused(tmp_path / "none")
    assert "there is no folder" in message
    assert "images/ and masks/" in message
