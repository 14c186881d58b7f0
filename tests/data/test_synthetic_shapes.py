"""Coloured shapes: the same for a seed, with boxes and masks that fit, and as files that other readers read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normswap.data import open_coco, open_masks, shapes, write_shapes
from normswap.errors import OptionError, OutputError


def test_an_item_is_what_torchvisions_detectors_take() -> None:
    data = shapes(8, size=48, seed=3)
    assert len(data) == 8
    for image, target in data:
        n = len(target["labels"])
        assert (image.shape, image.dtype) == ((3, 48, 48), torch.float32)
        assert image.min() >= 0
        assert image.max() <= 1
        assert (target["boxes"].shape, target["boxes"].dtype) == ((n, 4), torch.float32)
        assert (target["masks"].shape, target["masks"].dtype) == ((n, 48, 48), torch.uint8)
        assert target["labels"].dtype == torch.int64
        assert isinstance(target["image_id"], int)


def test_the_seed_decides_and_the_count_does_not() -> None:
    (x, a), (y, b) = shapes(3, size=32, seed=5)[2], shapes(9, size=32, seed=5)[2]
    assert torch.equal(x, y)
    assert torch.equal(a["boxes"], b["boxes"])
    assert not torch.equal(x, shapes(3, size=32, seed=6)[2][0])
    assert not torch.equal(x, shapes(3, size=32, seed=5)[1][0])


def test_boxes_are_the_tightest_around_the_masks_which_do_not_overlap() -> None:
    for _, target in shapes(20, size=64):
        assert target["masks"].sum(0).max() <= 1
        for box, mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
            x1, y1, x2, y2 = box
            assert mask.sum() == mask[y1:y2, x1:x2].sum()
            assert all(edge.any() for edge in (mask[y1], mask[y2 - 1], mask[:, x1], mask[:, x2 - 1]))


def test_the_forms_have_their_areas() -> None:
    share = {1: np.pi / 4, 2: 1.0, 3: 0.5}  # of the box: a circle, a square, a triangle
    for _, target in shapes(20, size=256):
        for box, label, mask in zip(target["boxes"], target["labels"].tolist(), target["masks"], strict=True):
            area = float((box[2] - box[0]) * (box[3] - box[1]))
            assert float(mask.sum()) / area == pytest.approx(share[label], rel=0.06)


def test_objects_stand_out_and_some_images_have_none() -> None:
    counts = []
    for image, target in shapes(60, size=48):
        counts.append(len(target["labels"]))
        for mask in target["masks"].bool():
            around = ~target["masks"].bool().any(0)
            assert (image[:, mask].mean(1) - image[:, around].mean(1)).norm() > 0.3
    assert set(counts) == {0, 1, 2, 3, 4}
    assert 1 <= counts.count(0) <= 15


def test_fewer_classes_leave_the_last_out() -> None:
    data = shapes(20, size=32, classes=1)
    assert data.categories == ("circle",)
    assert {int(label) for _, target in data for label in target["labels"]} == {1}


def test_iterating_ends_and_an_index_past_the_end_is_an_error() -> None:
    data = shapes(2, size=16)
    assert len(list(data)) == 2
    assert torch.equal(data[-1][0], data[1][0])
    with pytest.raises(IndexError):
        data[2]


def test_what_was_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "new", 6, size=40, seed=2)
    read = open_coco(folder / "annotations.json", folder / "images", masks=True)
    assert read.categories == ("circle", "square", "triangle")
    assert len(read) == 6
    for (image, target), (same, expected) in zip(read, shapes(6, size=40, seed=2), strict=True):
        assert torch.equal(image, same)
        assert target.keys() == expected.keys()
        assert all(torch.equal(target[key], expected[key]) for key in ("boxes", "labels", "masks"))


def test_the_masks_as_png_hold_labels_and_0_for_the_background(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "new", 6, size=40)
    data = open_masks(folder)
    assert data.count_classes() <= 4
    for (_, mask), (_, target) in zip(data, shapes(6, size=40), strict=True):
        expected = (target["masks"].long() * target["labels"].view(-1, 1, 1)).sum(0)
        assert torch.equal(mask, expected)


def test_pycocotools_reads_the_file_as_we_do(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    folder = write_shapes(tmp_path / "new", 5, size=40)
    api = coco.COCO(str(folder / "annotations.json"))
    for image_id, (_, target) in zip(api.getImgIds(), shapes(5, size=40), strict=True):
        found = api.loadAnns(api.getAnnIds(imgIds=image_id))
        masks = [torch.from_numpy(api.annToMask(one)) for one in found]
        assert all(torch.equal(a, b) for a, b in zip(masks, target["masks"], strict=True))
        assert [one["area"] for one in found] == [int(mask.sum()) for mask in masks]


def test_the_file_has_what_coco_asks_for(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "new", 3, size=32)
    content = json.loads((folder / "annotations.json").read_text("utf-8"))
    assert {"id", "file_name", "width", "height"} <= content["images"][0].keys()
    needed = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}
    assert all(needed <= one.keys() for one in content["annotations"])
    with Image.open(folder / "images" / content["images"][0]["file_name"]) as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x", "utf-8")
    with pytest.raises(OutputError, match="not empty"):
        write_shapes(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_shapes(tmp_path / "mine.txt" / "below", 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"count": 0}, "count"), ({"count": 1, "size": 8}, "size"), ({"count": 1, "classes": 4}, "3 classes"),
     ({"count": 1, "classes": 0}, "classes"), ({"count": 1, "seed": -1}, "seed"), ({"count": 1.5}, "count"),
     ({"count": True}, "count")],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        shapes(**options)
