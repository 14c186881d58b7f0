"""`normswap finetune --task detection` and `--task segmentation`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from box_formats import as_voc, as_yolo
from ran import Cli

import normswap
from normswap.data import write_shapes

DETECTORS = """
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from normswap.detection import detector


def tiny():
    torch.manual_seed(0)
    few = {"rpn_batch_size_per_image": 16, "box_batch_size_per_image": 8, "rpn_post_nms_top_n_train": 10,
           "rpn_post_nms_top_n_test": 10}
    return detector("fasterrcnn", backbone=ResNet(BasicBlock, [1, 1, 1, 1]), num_classes=9, norm="bn", width=32,
                    min_size=64, max_size=64, **few).eval()


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.classifier = nn.Sequential(nn.Conv2d(8, 2, 1))

    def forward(self, x):
        return {"out": self.classifier(self.backbone(x))}


def pixels():
    torch.manual_seed(0)
    return Pixels().eval()
"""
FIXED = ("finetune", "--weights", "none", "--trust-code", "--device", "cpu", "--steps", "2", "--calibrate-images", "2")


@pytest.fixture(autouse=True)
def _data(cli: Cli) -> None:
    torch.set_num_threads(1)
    Path("own.py").write_text(DETECTORS)
    write_shapes("shapes/train", 4, size=64, seed=0)
    write_shapes("shapes/val", 2, size=64, seed=1)


@pytest.mark.usefixtures("pictures")
def test_a_detector_is_converted_by_role_calibrated_and_trained(cli: Cli) -> None:
    rules = ["--rule", "role:backbone=frozen", "--rule", "*=gn", "--groups", "8"]
    ran = cli(*FIXED, "own.py:tiny", "--task", "detection", "--data", "shapes", *rules, "-o", "run", "--json")
    assert ran.code == 0, ran.err
    assert "calibrated on 2 training images" in ran.err
    assert ran.json["best_name"] == "val_map"
    assert {"loss_classifier", "val_map_50"} <= set(ran.json["figures"])
    names = {p.name for p in Path("run").iterdir()}
    assert names >= {"best.safetensors", "last.safetensors", "state.pt", "metrics.jsonl", "curves.png", "examples.png"}
    model = normswap.load("run/last.safetensors", trust_code=True)
    assert model.roi_heads.box_predictor.cls_score.out_features == 4


@pytest.mark.parametrize("write", [None, as_yolo, as_voc])
def test_boxes_that_are_taken_for_classes_are_told_with_the_task_that_reads_them(
    cli: Cli, write: Callable[[Path, Path, str], Path] | None
) -> None:
    if write is not None:
        for part in ("train", "val"):
            write(Path("shapes", part), Path("boxes"), part)
    data = ("--data", "shapes" if write is None else "boxes")
    for ran in (cli(*FIXED, "own.py:tiny", *data), cli("evaluate", "own.py:tiny", *data)):
        assert ran.code == 1
        assert "Boxes lie there, in the format of " in ran.err
        assert "--task detection" in ran.err
    assert not Path("runs", "tiny").exists()


@pytest.mark.parametrize("write", [as_yolo, as_voc])
def test_yolo_and_voc_are_trained_and_measured_on(cli: Cli, write: Callable[[Path, Path, str], Path]) -> None:
    for part in ("train", "val"):
        write(Path("shapes", part), Path("boxes"), part)
    data = "boxes/data.yaml" if write is as_yolo else "boxes"
    ran = cli(*FIXED, "own.py:tiny", "--task", "detection", "--data", data, "-o", "run", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["validation_images"] == 2
    found = cli("evaluate", "run/last.safetensors", "--trust-code", "--task", "detection", "--data", data, "--json")
    assert found.json["images"] == 2
    assert {each["name"] for each in found.json["classes"]} <= {"circle", "square", "triangle"}


def test_a_broken_label_is_one_sentence_with_file_and_line(cli: Cli) -> None:
    labels = as_yolo(Path("shapes/train"), Path("boxes")) / "labels" / "train" / "000002.txt"
    labels.write_text("7 0.5 0.5 0.1 0.1\n")
    ran = cli("evaluate", "own.py:tiny", "--weights", "none", "--task", "detection", "--data", "boxes")
    assert ran.code == 1
    assert "boxes/labels/train/000002.txt, line 1: class 7 is not one of the 3 that are named" in ran.err


@pytest.mark.usefixtures("pictures")
def test_annotations_may_lie_elsewhere(cli: Cli) -> None:
    for part in ("train", "val"):
        shutil.move(f"shapes/{part}/annotations.json", f"{part}.json")
    place = ["--data", "shapes/train/images", "--annotations", "train.json"]
    place += ["--eval-data", "shapes/val/images", "--eval-annotations", "val.json"]
    ran = cli(*FIXED, "own.py:tiny", "--task", "detection", *place, "-o", "run")
    assert ran.code == 0, ran.err
    assert "val map" in ran.out
    assert "examples.png" in ran.out


def test_a_segmentation_network_is_trained(cli: Cli) -> None:
    more = ["--task", "segmentation", "--data", "shapes", "--to", "gn", "--groups", "2", "-o", "run", "--json"]
    ran = cli(*FIXED, "own.py:pixels", *more)
    assert ran.code == 0, ran.err
    assert {"val_miou", "val_loss", "pixel_accuracy"} <= set(ran.json["figures"])
    model = normswap.load("run/last.safetensors", trust_code=True)
    assert model.classifier[0].out_channels == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--task", "tracking"), "--task"),
        (("--task", "detection", "--size", "64"), "--size"),
        (("--annotations", "a.json"), "--task detection"),
        (("--task", "detection", "--eval-annotations", "a.json"), "--annotations"),
        (("--task", "detection", "--data", "torchvision:CIFAR10"), "torchvision:NAME"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(cli: Cli, more: tuple[str, ...], message: str) -> None:
    data = () if "--data" in more else ("--data", "shapes")
    ran = cli(*FIXED, "own.py:tiny", *data, *more)
    assert ran.code == 2
    assert message in ran.err


def test_a_folder_without_annotations_and_an_unfit_option_are_named(cli: Cli) -> None:
    ran = cli(*FIXED, "own.py:tiny", "--task", "detection", "--data", "shapes/train/images")
    assert ran.code == 1
    assert "annotations.json" in ran.err
    ran = cli(*FIXED, "own.py:tiny", "--task", "detection", "--data", "shapes", "--distil", "0.5")
    assert ran.code == 2
    assert "classification" in ran.err
