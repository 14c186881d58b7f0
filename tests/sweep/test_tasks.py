"""Detectors and segmentation networks in `compare`: their own figures, on the data that `finetune` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectors import shapes_folder
from torch import Tensor, nn

import normswap
from normswap.detection import detector

FEW = {
    "rpn_batch_size_per_image": 16, "box_batch_size_per_image": 8, "rpn_pre_nms_top_n_train": 20,
    "rpn_post_nms_top_n_train": 10, "rpn_pre_nms_top_n_test": 20, "rpn_post_nms_top_n_test": 10,
}  # fmt: skip


class Stem(nn.Module):
    """One map of stride 8."""

    out_channels = 16

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 8), (8, 16), (16, 16)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": self.body(x)}


def finder(classes: int = 4) -> nn.Module:
    """Finds a box here and there, with the statistics of its images."""
    torch.manual_seed(0)
    options: Any = {"norm": None, "min_size": 64, "max_size": 64, "anchor_sizes": (16,), **FEW}
    return detector("fasterrcnn", backbone=Stem(), num_classes=classes, **options).eval()


class Pixels(nn.Module):
    """Scores of each pixel at half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.classifier = nn.Sequential(nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.classifier(self.backbone(x))}


def painter() -> nn.Module:
    torch.manual_seed(0)
    return Pixels().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_folder(tmp_path_factory.mktemp("shapes"), 64)


@pytest.fixture(scope="module")
def found(folder: Path) -> nn.Module:
    """A detector that knows a little."""
    model = finder()
    normswap.finetune(model, folder, task="detection", batch_size=4, steps=60, lr=0.01, device="cpu", progress=False)
    return model


def by_hand(model: nn.Module, folder: Path, task: Any, calibrated: list[Any]) -> tuple[float, float]:
    """The figure right after the conversion, and that after calibrating."""
    network = normswap.convert(model, "gn", groups=4, eps="auto")
    before = normswap.evaluate(network, folder, task=task).score[1]
    normswap.calibrate(network, model, calibrated, progress=False)
    return before, normswap.evaluate(network, folder, task=task).score[1]


def test_a_detector_has_the_map_that_evaluate_gives(found: nn.Module, folder: Path, tmp_path: Path) -> None:
    report = normswap.compare(found, folder, task="detection", output=tmp_path, groups=[4], images=4)
    base, gn = report.results
    assert (report.figure, report.told) == ("map", "mAP")
    assert base.score == pytest.approx(normswap.evaluate(found, folder, task="detection").score[1])
    assert base.score > 0.01
    train = normswap.data.open_coco(folder / "train" / "annotations.json", folder / "train" / "images")
    images = [image for image, _ in train][::2]
    assert (gn.converted, gn.score) == pytest.approx(by_hand(found, folder, "detection", [images[:2], images[2:]]))
    assert gn.accuracy is None
    assert gn.to_dict()["map"] == gn.score
    assert "accuracy" not in gn.to_dict()
    assert gn.evaluated == 3
    assert report.rests_on == "mAP on 3 validation images; calibrated on 4 training images"


def test_a_segmenter_has_the_mean_iou_that_evaluate_gives(folder: Path, tmp_path: Path) -> None:
    model = painter()
    report = normswap.compare(model, folder, task="segmentation", output=tmp_path, groups=[4], images=4)
    base, gn = report.results
    assert base.score == pytest.approx(normswap.evaluate(model, folder, task="segmentation").score[1])
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    images = [((image - mean) / std)[None] for image, _ in normswap.data.open_masks(folder / "train")][::2]
    assert (gn.converted, gn.score) == pytest.approx(by_hand(model, folder, "segmentation", images))
    assert ">mean IoU" in report.table().columns
    assert (tmp_path / "table.csv").read_text().startswith("norm,groups,batch_size,miou,")


@pytest.mark.usefixtures("pictures")
def test_a_trained_detector_is_the_run_that_finetune_makes(found: nn.Module, folder: Path, tmp_path: Path) -> None:
    asked: Any = {"task": "detection", "batch_sizes": [4], "epochs": 1, "images": 4}
    report = normswap.compare(found, folder, output=tmp_path / "all", norms=["frozen"], **asked)
    network = normswap.convert(found, "frozen")
    run = normswap.finetune(network, folder, task="detection", batch_size=4, epochs=1, output=tmp_path / "run")
    assert report.results[0].score == run.figures["val_map"]
    assert [path.name for path in report.pictures] == ["map-over-batch-size.png", "curves-batch-4.png"]


def test_a_detector_of_other_classes_has_no_map_untrained(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(normswap.DataError, match="the data has 3 classes and the network tells 1 apart"):
        normswap.compare(finder(2), folder, task="detection", output=tmp_path, images=4)


def test_a_comparison_of_another_task_is_another_comparison(folder: Path, tmp_path: Path) -> None:
    normswap.compare(painter(), folder, task="segmentation", output=tmp_path, norms=["bn"], images=2)
    with pytest.raises(normswap.OptionError, match=r"task 'segmentation' \(now 'detection'\)"):
        normswap.compare(finder(), folder, task="detection", output=tmp_path, norms=["bn"], images=2)
