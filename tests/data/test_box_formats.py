"""YOLO's and Pascal VOC's files: what comes out, and which file and line an error names."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from box_formats import YAML, as_voc, as_yolo
from PIL import Image
from torch import Tensor

from normswap.data import BoxData, open_coco, open_images, open_voc, open_yolo, write_shapes
from normswap.errors import DataError, NormswapError
from normswap.finetuning.datasets.boxes import open_boxes, open_one


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of 64 x 64, so that shares of it are exact, one of them without objects."""
    return write_shapes(tmp_path_factory.mktemp("coco") / "shapes", 6, size=64, seed=7)


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """One image of 20 x 10 pixels, named a.png, with a label file to write."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "data.yaml").write_text(f"{YAML}train: images\n")
    (tmp_path / "labels" / "a.txt").write_text("1 0.5 0.5 0.2 0.4\n")
    return tmp_path


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """The same image with an XML file."""
    for name in ("Annotations", "JPEGImages"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / "JPEGImages" / "a.png")
    (tmp_path / "Annotations" / "a.xml").write_text(xml(thing("dog", 9, 4, 12, 7)))
    return tmp_path


def thing(name: str, *corners: Any, more: str = "") -> str:
    box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False))
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def xml(*things: str, size: str = "<size><width>20</width><height>10</height></size>") -> str:
    return "\n".join(["<annotation>", size, *things, "</annotation>"])


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return caught.value.message


def contents(data: BoxData) -> list[tuple[Tensor, list[list[float]], list[str], int]]:
    found = [data[i] for i in range(len(data))]
    names = data.categories
    return [(x, t["boxes"].tolist(), [names[n - 1] for n in t["labels"]], t["image_id"]) for x, t in found]


# --- the same in every format --------------------------------------------------------------------------------------


def test_the_same_set_in_three_formats_gives_the_same_images_boxes_and_labels(coco: Path, tmp_path: Path) -> None:
    truth = open_coco(coco / "annotations.json", coco / "images")
    for data in (open_yolo(as_yolo(coco, tmp_path / "yolo")), open_voc(as_voc(coco, tmp_path / "voc"))):
        assert data.categories == truth.categories
        for (image, *mine), (true, *theirs) in zip(contents(data), contents(truth), strict=True):
            assert torch.equal(image, true)
            assert mine == theirs
        assert data.notes == truth.notes


def test_parts_are_found_by_the_names_of_the_format(coco: Path, tmp_path: Path) -> None:
    for write in (as_yolo, as_voc):
        place = tmp_path / write.__name__
        write(coco, place, "train")
        sets = open_boxes(place)
        assert len(sets.train) + len(sets.validation) == 6
        assert "held back" in sets.note
        smaller = write_shapes(tmp_path / f"{write.__name__}-val", 2, size=64, seed=1)
        write(smaller, place, "val")
        sets = open_boxes(place)
        assert (len(sets.train), len(sets.validation)) == (6, 2)
        assert sets.classes == ("circle", "square", "triangle")
        assert len(open_one(place).validation) == 2


def test_a_folder_with_boxes_in_two_formats_is_refused_with_both_named(coco: Path, tmp_path: Path) -> None:
    place = as_yolo(coco, tmp_path / "both")
    shutil.copy(coco / "annotations.json", place)
    message = refused(lambda: open_boxes(place))
    assert "COCO (annotations.json) and YOLO (data.yaml)" in message
    as_voc(coco, place)
    assert "3 formats" in refused(lambda: open_boxes(place))
    assert len(open_boxes(place / "data.yaml").train) == 5  # named, it is clear


def test_only_a_part_to_train_on_is_trained_on(coco: Path, tmp_path: Path) -> None:
    place = as_yolo(coco, tmp_path / "yolo", "test")
    assert "no part to train on, but test" in refused(lambda: open_boxes(place))
    assert len(open_one(place).validation) == 6


@pytest.mark.parametrize("write", [as_yolo, as_voc, None])
def test_where_boxes_are_described_the_images_alone_are_taken_without_labels(
    coco: Path, tmp_path: Path, write: Callable[[Path, Path], Path] | None
) -> None:
    place = coco if write is None else write(coco, tmp_path / "boxes")
    if write is None:
        place = tmp_path / "coco"
        shutil.copytree(coco, place, ignore=shutil.ignore_patterns("masks"))
    images = open_images(place)
    assert (len(images), images.classes) == (6, None)


# --- YOLO ----------------------------------------------------------------------------------------------------------


def test_yolos_shares_become_pixels(yolo: Path) -> None:
    image, target = open_yolo(yolo)[0]
    assert image.shape == (3, 10, 20)
    assert target["boxes"].tolist() == [[8, 3, 12, 7]]
    assert target["labels"].tolist() == [2]


def test_a_polygon_is_a_mask_with_a_box_around_it(yolo: Path) -> None:
    (yolo / "labels" / "a.txt").write_text("0 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.6\n")
    _, target = open_yolo(yolo, masks=True)[0]
    assert target["boxes"].tolist() == [[2, 2, 10, 6]]
    expected = torch.zeros(1, 10, 20, dtype=torch.uint8)
    expected[0, 2:6, 2:10] = 1
    assert torch.equal(target["masks"], expected)
    assert "masks" not in open_yolo(yolo)[0][1]


def test_boxes_beyond_the_image_are_clipped_or_left_out_with_a_note(yolo: Path) -> None:
    (yolo / "labels" / "a.txt").write_text("0 0.95 0.5 0.3 0.4\n1 0.5 0.5 0 0.4\n\n2 1.004 0.5 0.2 0.2\n")
    data = open_yolo(yolo)
    assert data[0][1]["boxes"].tolist() == [[pytest.approx(16), 3, 20, 7], [pytest.approx(18.08), 4, 20, 6]]
    assert data.notes == (
        "1 boxes of zero size inside their image are left out",
        "2 boxes reached outside their image and are clipped",
    )


def test_empty_and_missing_label_files_mean_no_object_and_are_told(yolo: Path) -> None:
    for name in ("b", "c"):
        shutil.copy(yolo / "images" / "a.png", yolo / "images" / f"{name}.png")
    (yolo / "labels" / "b.txt").write_text("")
    data = open_yolo(yolo)
    assert [len(data[i][1]["boxes"]) for i in range(3)] == [1, 0, 0]
    assert data.notes == (
        "1 images have no label file and count as without objects",
        "2 of 3 images have no object",
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("3 0.5 0.5 0.1 0.1", "class 3 is not one of the 3 that are named, 0 to 2"),
        ("-1 0.5 0.5 0.1 0.1", "class -1 is not one of"), ("0.5 0.5 0.5 0.1 0.1", "the class is 0.5, not a whole"),
        ("0 0.5 0.5 0.1", "3 numbers after the class; a box has 4"), ("0 .1 .1 .2 .2 .3", "5 numbers after the class"),
        ("0", "0 numbers after the class"), ("dog 0.5 0.5 0.1 0.1", "'dog 0.5 0.5 0.1 0.1' is not made of numbers"),
        ("0 10 20 5 5", "10 is not a share of the image's width or height"), ("0 nan .5 .1 .1", "nan is not a share"),
        ("inf .5 .5 .1 .1", "the class is inf"), ("0 .5 .5 -.1 .1", "-.1 is not a share"),
    ],
)  # fmt: skip
def test_a_broken_line_is_named_with_its_file_and_number(yolo: Path, line: str, words: str) -> None:
    (yolo / "labels" / "a.txt").write_text(f"1 0.5 0.5 0.2 0.4\n\n{line}\n")
    message = refused(lambda: open_yolo(yolo))
    assert f"a.txt, line 3: {words}" in message
    assert "1 labels are unusable" in message


def test_broken_lines_of_all_files_are_counted_together(yolo: Path) -> None:
    (yolo / "labels" / "a.txt").write_text("9 0.5 0.5 0.2 0.4\n" * 12)
    (yolo / "labels" / "lost.txt").write_text("")
    message = refused(lambda: open_yolo(yolo))
    assert "13 labels are unusable" in message
    assert "lost.txt: there is no image for it in" in message
    assert "and 3 more" in message
    (yolo / "labels" / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert "a.txt: it cannot be read as text" in refused(lambda: open_yolo(yolo))


def test_a_box_is_no_mask_for_a_network_that_predicts_masks(yolo: Path) -> None:
    assert "a.txt, line 1: a box, where" in refused(lambda: open_yolo(yolo, masks=True))


def test_labels_that_are_nowhere_are_missed(yolo: Path) -> None:
    (yolo / "labels" / "a.txt").unlink()
    assert "none of 1 image has labels; those of" in refused(lambda: open_yolo(yolo))
    (yolo / "images" / "a.png").unlink()
    assert "there is no image in" in refused(lambda: open_yolo(yolo))


def test_an_unreadable_image_is_told_when_it_is_read(yolo: Path) -> None:
    (yolo / "images" / "a.png").write_bytes(b"no image")
    assert "a.png: cannot identify image file" in refused(lambda: open_yolo(yolo)[0])


def test_images_that_exif_turns_are_told(yolo: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6
    Image.new("RGB", (20, 10)).save(yolo / "images" / "a.jpg", exif=turned)
    (yolo / "images" / "a.png").unlink()
    assert "1 images are turned by EXIF" in open_yolo(yolo).notes[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("names: {0: cat, 2: dog}\ntrain: images", "names has the numbers [0, 2], not 0 to 1"),
        ("names: cat\ntrain: images", "has no list of names"), ("train: images", "has no list of names"),
        ("names: [a, b]\nnc: 3\ntrain: images", "nc is 3, but there are 2 names"),
        ("names: [a, a]\ntrain: images", "names two classes 'a'"), ("- a", "holds ['a'], not names and paths"),
        ("names: [a, b\ntrain: images", "data.yaml, line 2: "), ("names: [a]\ntrain: 3", "train is 3, not a path"),
        ("names: [a]\ntrain: gone/train", "train is gone/train, and there is neither a folder nor a list"),
    ],
)  # fmt: skip
def test_a_broken_data_yaml_is_told(yolo: Path, text: str, words: str) -> None:
    (yolo / "data.yaml").write_text(text)
    assert words in refused(lambda: open_boxes(yolo))


def test_paths_are_found_from_path_from_the_file_and_as_roboflow_writes_them(yolo: Path) -> None:
    whole = YAML.replace("[circle, square, triangle]", "{0: circle, 1: square, 2: triangle}")
    for lines in ("path: ../{0}\ntrain: images", "path: {0}\ntrain: [images]", "train: ../images", "train: list.txt"):
        (yolo / "data.yaml").write_text(whole + lines.format(yolo.name))
        (yolo / "list.txt").write_text("./images/a.png\n\n")
        assert contents(open_yolo(yolo))[0][2] == ["square"]
    (yolo / "list.txt").write_text("images/a.png\nimages/gone.png\n")
    assert "list.txt, line 2: there is no image" in refused(lambda: open_yolo(yolo))


def test_without_a_yaml_file_classes_txt_names_the_classes(yolo: Path) -> None:
    (yolo / "data.yaml").unlink()
    assert "nothing names their classes" in refused(lambda: open_boxes(yolo))
    (yolo / "labels" / "classes.txt").write_text("cat\ndog\n\n")
    data = open_yolo(yolo)
    assert (data.categories, contents(data)[0][2]) == (("cat", "dog"), ["dog"])


def test_roboflows_train_folder_takes_the_names_from_the_file_beside_it(coco: Path, tmp_path: Path) -> None:
    place = as_yolo(coco, tmp_path / "yolo")
    (place / "train").mkdir()
    for kind in ("images", "labels"):
        shutil.move(place / kind / "train", place / "train" / kind)
    (place / "data.yaml").write_text(f"{YAML}train: ../train/images\n")
    assert len(open_yolo(place)) == len(open_yolo(place / "train")) == 6


def test_two_yaml_files_that_describe_data_are_told_and_others_are_not_looked_at(yolo: Path) -> None:
    (yolo / "hyp.yaml").write_text("lr: [")
    assert len(open_yolo(yolo)) == 1
    (yolo / "other.yaml").write_text(f"{YAML}train: images\n")
    assert "2 files that describe data, data.yaml and other.yaml" in refused(lambda: open_boxes(yolo))


def test_a_part_that_is_not_there_is_told(yolo: Path, tmp_path: Path) -> None:
    assert "has no part 'val', but train" in refused(lambda: open_yolo(yolo, "val"))
    assert "holds no boxes in YOLO's format" in refused(lambda: open_yolo(yolo / "images"))


def test_yaml_without_pyyaml_is_an_error_that_says_how_to_get_it(yolo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(NormswapError, match=r"needs PyYAML[\s\S]*normswap\[train\]"):
        open_yolo(yolo)


# --- Pascal VOC ----------------------------------------------------------------------------------------------------


def test_vocs_pixels_count_from_1_and_the_last_is_inside(voc: Path) -> None:
    image, target = open_voc(voc)[0]
    assert image.shape == (3, 10, 20)
    assert target["boxes"].tolist() == [[8, 3, 12, 7]]


def test_where_a_box_begins_at_0_pixels_count_from_0_and_it_is_told(voc: Path) -> None:
    (voc / "Annotations" / "a.xml").write_text(xml(thing("dog", 9, 4, 12, 7), thing("cat", 0, 0, 20, 10)))
    data = open_voc(voc)
    assert data[0][1]["boxes"].tolist() == [[9, 4, 12, 7], [0, 0, 20, 10]]
    assert data.notes == ("a box begins at 0, so pixels are taken to count from 0, not from 1",)


def test_difficult_objects_are_left_out_of_training_and_known_to_map(voc: Path) -> None:
    hard = thing("dog", 1, 1, 5, 5, more="<difficult>1</difficult>")
    (voc / "Annotations" / "a.xml").write_text(xml(thing("dog", 9, 4, 12, 7), hard))
    data = open_voc(voc)
    assert (len(data[0][1]["boxes"]), data.notes) == (1, ("1 difficult objects are left out of training",))
    target = open_one(voc).validation[0][1]
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["boxes"].tolist() == [[8, 3, 12, 7], [0, 0, 5, 5]]


def test_boxes_outside_of_the_image_are_clipped_or_left_out(voc: Path) -> None:
    (voc / "Annotations" / "a.xml").write_text(xml(thing("dog", 15, 4, 30, 7), thing("dog", 30, 4, 40, 7)))
    data = open_voc(voc)
    assert data[0][1]["boxes"].tolist() == [[14, 3, 20, 7]]
    assert len(data.notes) == 2


def test_without_a_size_the_images_own_is_taken(voc: Path) -> None:
    for size in ("", "<size><width>0</width><height>0</height></size>"):
        (voc / "Annotations" / "a.xml").write_text(xml(thing("dog", 1, 1, 99, 99), size=size))
        assert open_voc(voc)[0][1]["boxes"].tolist() == [[0, 0, 20, 10]]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (xml("<object><name>dog</name>"), 4, "it is not XML (mismatched tag)"), ("", 1, "it is not XML (no element"),
        ("<a/>", 1, "it begins with <a>, not <annotation>"), (xml(thing("", 1, 1, 2, 2)), 3, "an object has no name"),
        (xml("", thing("dog", 1, 1, 2)), 4, "'dog' has no ymax"), (xml("<object><name>dog</name></object>"), 3,
         "'dog' has no xmin"), (xml(thing("dog", 1, "x", 2, 2)), 3, "'dog' has 'x' as ymin"),
        (xml(thing("dog", 1, 1, "1e99", 2)), 3, "'dog' has '1e99' as xmax"),
        (xml(thing("dog", 5, 1, 2, 2)), 3, "'dog' ends at 2, 2"),
    ],
)  # fmt: skip
def test_a_broken_xml_file_is_named_with_its_line(voc: Path, text: str, line: int, words: str) -> None:
    (voc / "Annotations" / "b.xml").write_text(text)
    message = refused(lambda: open_boxes(voc))
    assert f"b.xml, line {line}: {words}" in message


def test_an_xml_file_without_an_image_is_named(voc: Path) -> None:
    shutil.copy(voc / "Annotations" / "a.xml", voc / "Annotations" / "b.xml")
    message = refused(lambda: open_voc(voc))
    assert "1 of 2 images are missing" in message
    assert "b.xml: there is no image b" in message
    (voc / "Annotations" / "b.xml").write_text(xml("<filename>a.png</filename>"))
    assert len(open_voc(voc)) == 2  # the name in the file counts where that of the file leads nowhere


def test_a_list_that_names_what_is_not_there_is_told_with_its_line(voc: Path) -> None:
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    (voc / "ImageSets" / "Main" / "train.txt").write_text("a\n\ngone 1\n")
    assert "train.txt, line 3: there is no" in refused(lambda: open_voc(voc))
    (voc / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    assert "has no part 'val', but train" in refused(lambda: open_voc(voc, "val"))


def test_xml_files_beside_their_images_and_a_devkit_are_found(coco: Path, tmp_path: Path) -> None:
    place = as_voc(coco, tmp_path / "VOCdevkit" / "VOC2007")
    assert len(open_voc(tmp_path)) == len(open_voc(tmp_path / "VOCdevkit")) == 6
    for part in ("train", "valid"):
        shutil.copytree(place / "Annotations", tmp_path / "flat" / part)
        shutil.copytree(place / "JPEGImages", tmp_path / "flat" / part, dirs_exist_ok=True)
    assert (len(open_voc(tmp_path / "flat")), len(open_voc(tmp_path / "flat", "valid"))) == (6, 6)
    as_voc(coco, tmp_path / "VOCdevkit" / "VOC2012")
    assert "2 data sets, VOC2007 and VOC2012" in refused(lambda: open_voc(tmp_path))
    assert "no boxes in the format of Pascal VOC" in refused(lambda: open_voc(coco))


def test_vocs_boxes_are_no_masks(voc: Path) -> None:
    assert "the network predicts masks" in refused(lambda: open_boxes(voc, masks=True))
