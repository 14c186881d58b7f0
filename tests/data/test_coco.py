"""Reading COCO files: what comes out, what is mended with a note, and what is an error that names its offenders."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from normswap.data import CocoData, open_coco, write_shapes
from normswap.data.coco_masks import mask_of, rle_of
from normswap.errors import DataError, NormswapError


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A file of three images, the second without objects; category ids have gaps and are out of order."""
    for i, size in enumerate([(20, 10), (8, 8), (16, 12)]):
        (tmp_path / "images").mkdir(exist_ok=True)
        pixels = np.full((size[1], size[0], 3), 51 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return {
        "images": [
            {"id": 7, "file_name": "0.png", "width": 20, "height": 10},
            {"id": 5, "file_name": "1.png", "width": 8, "height": 8},
            {"id": 6, "file_name": "2.png", "width": 16, "height": 12},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 3, 5, 4], "iscrowd": 0},
            {"id": 2, "image_id": 6, "category_id": 3, "bbox": [0, 0, 16, 12]},
            {"id": 3, "image_id": 7, "category_id": 3, "bbox": [1.5, 0.5, 3.0, 2.0]},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 4, "name": "unused"}],
    }


def opened(content: Any, folder: Path, **options: Any) -> CocoData:
    (folder / "labels.json").write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return open_coco(folder / "labels.json", folder / "images", **options)


def refused(content: Any, folder: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened(content, folder, **options)
    return str(caught.value)


def test_boxes_become_corners_and_category_ids_become_labels_from_1(content: dict[str, Any], tmp_path: Path) -> None:
    data = opened(content, tmp_path)
    assert (data.categories, data.category_ids) == (("cat", "unused", "dog"), (3, 4, 90))
    image, target = data[0]
    assert (image.shape, image.dtype) == ((3, 10, 20), torch.float32)
    assert target["boxes"].tolist() == [[2, 3, 7, 7], [1.5, 0.5, 4.5, 2.5]]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [3, 1]
    assert target["image_id"] == 7
    assert data[2][0].unique().tolist() == pytest.approx([0.4])
    assert str(data).endswith("3 images, 3 boxes in 3 categories")


def test_an_image_without_objects_has_empty_boxes(content: dict[str, Any], tmp_path: Path) -> None:
    data = opened(content, tmp_path)
    _, target = data[1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert data.notes == ("1 of 3 images have no object",)


def test_a_file_without_any_annotation_is_read(content: dict[str, Any], tmp_path: Path) -> None:
    assert len(opened(content | {"annotations": []}, tmp_path)) == 3


def test_boxes_are_clipped_dropped_and_crowds_left_out_with_a_note_each(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["annotations"] += [
        {"id": 4, "image_id": 5, "category_id": 3, "bbox": [-2, 4, 6, 40]},
        {"id": 5, "image_id": 5, "category_id": 3, "bbox": [1, 1, 0, 3]},
        {"id": 6, "image_id": 5, "category_id": 3, "bbox": [1, 1, 3, -3]},
        {"id": 7, "image_id": 5, "category_id": 3, "bbox": [30, 1, 3, 3]},
        {"id": 8, "image_id": 5, "category_id": 3, "bbox": [1, 1, 3, 3], "iscrowd": 1},
    ]
    data = opened(content, tmp_path)
    assert data[1][1]["boxes"].tolist() == [[0, 4, 4, 8]]
    assert data.notes == (
        "3 boxes of zero size inside their image are left out",
        "1 boxes reached outside their image and are clipped",
        "1 crowds are left out of training",
    )
    target = replace(data, crowds=True)[1][1]
    assert target["boxes"].tolist() == [[0, 4, 4, 8], [1, 1, 4, 4]]
    assert target["iscrowd"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bbox": [1, 1, 10**400, 3]}, "not four numbers"),
        ({"id": [1]}, "not a whole number"),
        ({"bbox": [2.0, 1, 1e-9, 3]}, ""),
    ],
)
def test_numbers_that_are_none_are_refused_and_boxes_too_thin_for_float32_left_out(
    content: dict[str, Any], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    content["annotations"] += [{"id": 4, "image_id": 5, "category_id": 3, "bbox": [1, 1, 3, 3], **change}]
    if words:
        with pytest.raises(DataError, match=words):
            opened(content, tmp_path)
    else:
        data = opened(content, tmp_path)
        assert data.notes[0] == "1 boxes of zero size inside their image are left out"


# --- masks --------------------------------------------------------------------------------------------------------


def test_masks_come_from_polygons_and_run_lengths(content: dict[str, Any], tmp_path: Path) -> None:
    first, second, third = content["annotations"]
    first["segmentation"] = [[2, 3, 7, 3, 7, 7, 2, 7], [10, 0, 12, 0, 12, 2, 10, 2]]
    third["segmentation"] = {"size": [10, 20], "counts": [10, 15, 175]}
    second["segmentation"] = {"size": [12, 16], "counts": [0, 192]}
    masks = opened(content, tmp_path, masks=True)[0][1]["masks"]
    assert (masks.dtype, masks.shape) == (torch.uint8, (2, 10, 20))
    expected = torch.zeros(2, 10, 20, dtype=torch.uint8)
    expected[0, 3:7, 2:7] = expected[0, :2, 10:12] = 1
    expected[1, :, 1] = expected[1, :5, 2] = 1
    assert torch.equal(masks, expected)
    assert opened(content, tmp_path, masks=True)[1][1]["masks"].shape == (0, 8, 8)


@pytest.mark.parametrize(
    ("text", "rows"),
    [  # strings that pycocotools 2.0.11 wrote for these masks
        ("9", ["000", "000", "000"]),
        ("09", ["111", "111", "111"]),
        ("11104", ["010", "100", "000"]),
    ],
)
def test_compressed_run_lengths_are_those_of_pycocotools(text: str, rows: list[str]) -> None:
    expected = torch.tensor([[int(bit) for bit in row] for row in rows], dtype=torch.uint8)
    assert torch.equal(mask_of({"size": [3, 3], "counts": text}, 3, 3), expected)


def test_plain_run_lengths_are_zeros_and_ones_in_turn_down_the_columns() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = [int(n) for n in rng.multinomial(13 * 70, rng.dirichlet(np.ones(9)))]
        bits = [i % 2 for i, n in enumerate(counts) for _ in range(n)]
        expected = np.array(bits).reshape(70, 13).T
        assert np.array_equal(mask_of({"size": [13, 70], "counts": counts}, 13, 70).numpy(), expected)


def test_a_polygon_has_the_area_of_the_shoelace_formula() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        angle, radius = np.sort(rng.uniform(0, 6.28, 8)), rng.uniform(12, 28, 8)
        x, y = 32 + radius * np.cos(angle), 32 + radius * np.sin(angle)
        area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
        mask = mask_of([np.stack([x, y], 1).ravel().tolist()], 64, 64)
        assert int(mask.sum()) == pytest.approx(area, abs=0.5 * np.hypot(np.diff(x), np.diff(y)).sum())


@pytest.mark.parametrize("rows", [["000", "000"], ["111", "111"], ["011", "010"], ["100", "001"]])
def test_run_lengths_of_a_mask_lead_back_to_it(rows: list[str]) -> None:
    mask = torch.tensor([[int(bit) for bit in row] for row in rows], dtype=torch.uint8)
    assert torch.equal(mask_of(json.loads(json.dumps(rle_of(mask))), 2, 3), mask)


def test_masks_without_pycocotools_are_an_error_that_says_how_to_get_it(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert len(opened(content, tmp_path)) == 3  # boxes need none
    with pytest.raises(NormswapError, match=r"need pycocotools[\s\S]*pip install 'normswap\[train\]'"):
        opened(content, tmp_path, masks=True)
    with pytest.raises(NormswapError, match="need pycocotools"):
        write_shapes(tmp_path / "new", 2)
    assert not (tmp_path / "new").exists()


def test_a_polygon_covers_its_area_and_may_reach_outside() -> None:
    assert int(mask_of([[10.0, 5.0, 30.0, 5.0, 10.0, 25.0]], 40, 40).sum()) == pytest.approx(200, rel=0.06)
    assert int(mask_of([[-5, -5, 4, -5, 4, 3, -5, 3]], 40, 40).sum()) == 12
    assert int(mask_of([[50, 50, 60, 50, 60, 60]], 40, 40).sum()) == 0


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ("text", "neither a list of polygons"), ([], "neither"), ([[1, 2, 3, 4]], "three points"),
        ([[1, 2, 3, 4, 5, None]], "three points"), ({"size": [9, 9], "counts": [81]}, r"size is \[9, 9\]"),
        ({"size": [10, 20], "counts": [1, 2]}, "add up to 3"), ({"size": [10, 20]}, "neither numbers nor"),
        ({"size": [10, 20], "counts": "\n"}, "no compressed"), ({"size": [10, 20], "counts": "1o"}, "no compressed"),
        ({"size": [10, 20], "counts": "oooo0"}, "Invalid RLE"), ({"size": [10, 20], "counts": [-1, 201]}, "neither"),
    ],
)  # fmt: skip
def test_an_unusable_mask_is_named_when_it_is_read(
    content: dict[str, Any], tmp_path: Path, segmentation: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        mask_of(segmentation, 10, 20)
    for annotation in content["annotations"]:
        annotation["segmentation"] = segmentation or "x"
    with pytest.raises(DataError, match=r"object 1 of image 0\.png is unusable"):
        opened(content, tmp_path, masks=True)[0]


def test_missing_segmentations_are_named_before_anything_is_read(content: dict[str, Any], tmp_path: Path) -> None:
    assert "3 annotations have no mask:\n  id 1: no segmentation" in refused(content, tmp_path, masks=True)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON: "), ("", "is not JSON"), ("[" * 100_000, "is not JSON"),
        ("[]", "no list 'images' or 'annotations' or 'categories'"), ('{"images": [], "categories": []}',
         "no list 'annotations'"), ('{"images": {}, "annotations": [], "categories": []}', "no list 'images'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "lists no images"),
    ],
)  # fmt: skip
def test_what_is_no_coco_file_is_said(tmp_path: Path, text: str, words: str) -> None:
    message = refused(text, tmp_path)
    assert words in message
    assert "labels.json" in message


def test_a_missing_annotation_file_or_folder_is_said(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no annotation file"):
        open_coco(tmp_path / "none.json", tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        open_coco(tmp_path, tmp_path)
    opened(content, tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        open_coco(tmp_path / "labels.json", tmp_path / "none")


@pytest.mark.parametrize(
    ("table", "place", "change", "words"),
    [
        ("images", 0, {"width": None}, "id 7: its width and height are [None, 10]"),
        ("images", 1, {"file_name": 3}, "id 5: its file_name is 3"),
        ("images", 1, {"id": 7}, "ids that are given more than once:\n  id 7"),
        ("images", 1, {"id": "a"}, "its id is 'a', not a whole number"),
        ("categories", 0, {"id": 3}, "ids that are given more than once:\n  id 3"),
        ("annotations", 0, {"image_id": 99}, "1 annotations name images that it does not list:\n  id 1: image_id 99"),
        ("annotations", 0, {"category_id": 1}, "annotations name categories that it does not list:\n  id 1: category"),
        ("annotations", 2, {"bbox": [1, 2, 3]}, "id 3: its bbox is [1, 2, 3], not four numbers"),
        ("annotations", 2, {"bbox": [1, 2, float("nan"), 2]}, "not four numbers"),
        ("annotations", 2, {"bbox": None}, "id 3: its bbox is None"),
    ],
)
def test_an_entry_that_is_wrong_is_named(
    content: dict[str, Any], tmp_path: Path, table: str, place: int, change: dict[str, Any], words: str
) -> None:
    content[table][place] |= change
    assert words in refused(content, tmp_path)


@pytest.mark.parametrize(("table", "key"), [("images", "width"), ("annotations", "bbox"), ("categories", "name")])
def test_a_key_that_is_missing_is_named(content: dict[str, Any], tmp_path: Path, table: str, key: str) -> None:
    del content[table][1][key]
    content[table].append([1])
    message = refused(content, tmp_path)
    assert f"2 entries of {table} are incomplete" in message
    assert f"no {key!r}" in message
    assert f"number {len(content[table])}: it is [1], not an object" in message


def test_missing_images_are_counted_and_ten_are_named(content: dict[str, Any], tmp_path: Path) -> None:
    content["images"] += [
        {"id": 100 + i, "file_name": f"gone/{i}.png", "width": 5, "height": 5} for i in range(12)
    ]  # fmt: skip
    message = refused(content, tmp_path)
    assert f"12 of 15 images are not in {tmp_path / 'images'}" in message
    assert len(re.findall(r"gone/\d+\.png", message)) == 10
    assert "and 2 more" in message


def test_images_in_subfolders_are_found(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "images" / "deep").mkdir()
    (tmp_path / "images" / "1.png").rename(tmp_path / "images" / "deep" / "1.png")
    content["images"][1]["file_name"] = "deep/1.png"
    assert opened(content, tmp_path)[1][0].shape == (3, 8, 8)


def test_images_that_cannot_be_read_or_have_another_size_are_reported_together(
    content: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "images" / "0.png").write_bytes(b"no image")
    Image.new("RGB", (9, 8)).save(tmp_path / "images" / "1.png")
    data = opened(content, tmp_path)
    assert data[2][0].shape == (3, 12, 16)
    with pytest.raises(DataError, match="2 of 3 images") as caught:
        data[0]
    assert "0.png: cannot identify image file" in str(caught.value)
    assert "1.png: it is 9 x 8, the annotation file says 8 x 8" in str(caught.value)
