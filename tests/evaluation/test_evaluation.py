"""`normswap.evaluate`: figures of all classes and of each, against independent counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from box_formats import as_voc, as_yolo
from detectors import build
from helpers import fingerprint
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

import normswap
from normswap.data import open_images, write_shapes
from normswap.demo.digits import split
from normswap.demo.network import pretrained
from normswap.errors import DataError, NetworkError, OptionError


class Given(nn.Module):
    """Gives what it was made with, row after row; its input says which row."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores[x[:, 0].long()]


def numbered(scores: Tensor, labels: Tensor, **more: Any) -> Any:
    return normswap.evaluate(Given(scores), (torch.arange(len(scores))[:, None].float(), labels), **more)


def test_accuracies_and_confusion_are_those_of_an_independent_count() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(90, 7, generator=generator), torch.randint(0, 6, (90,), generator=generator)
    report = numbered(scores, labels, batch_size=16)
    order, true = (-scores).numpy().argsort(1), labels.numpy()
    assert report.figures == {
        "accuracy": pytest.approx((order[:, 0] == true).mean()),
        "accuracy_top5": pytest.approx((order[:, :5] == true[:, None]).any(1).mean()),
    }
    for each in report.classes:
        chosen = true == int(each.name)
        assert (each.count, each.value) == (chosen.sum(), pytest.approx((order[chosen, 0] == int(each.name)).mean()))
    counts = np.zeros((7, 7), int)
    np.add.at(counts, (true, order[:, 0]), 1)
    assert {(i, j): n for i, j, n in report.confusion} == {(i, j): counts[i, j] for i, j in np.argwhere(counts)}
    assert len(report.classes) == 6  # nothing is said of the class that the data lacks


def test_scores_that_are_nan_are_no_answer_and_never_right() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.0], [torch.nan, 0.0, 0.0], [torch.nan, torch.nan, torch.nan]])
    report = numbered(scores, torch.tensor([0, 0, 0]))
    assert report.figures["accuracy"] == pytest.approx(1 / 3)
    assert report.classes[0].value == pytest.approx(1 / 3)
    assert report.taken_for() == {"0": ("NaN", 2)}


def test_few_classes_have_no_top_5() -> None:
    assert list(numbered(torch.eye(5), torch.arange(5)).figures) == ["accuracy"]


def test_the_accuracy_is_that_of_verify_and_the_network_stays_as_it_is() -> None:
    _, test = split()
    model = pretrained().train()
    before = fingerprint(model)
    report = normswap.evaluate(model, (test.images, test.labels), batch_size=100, device="cpu")
    assert fingerprint(model) == before
    compared = normswap.verify(model, model, (test.images, test.labels))
    assert report.score == ("accuracy", compared.accuracy_a)
    assert report.images == len(test)


def coloured(folder: Path, names: dict[str, int], count: int = 2) -> Path:
    """Grey pictures, one brightness a class."""
    for name, brightness in names.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (brightness, brightness, brightness)).save(folder / name / f"{i}.png")
    return folder


class Brightness(nn.Module):
    """Says `int(brightness / 10)`, of `known` classes."""

    def __init__(self, known: int) -> None:
        super().__init__()
        self.known = known
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot((x.mean((1, 2, 3)) * 25.5).round().long(), self.known).float()


RAW = normswap.data.Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3)


def test_a_folder_of_the_networks_classes_is_taken_in_order(tmp_path: Path) -> None:
    folder = coloured(tmp_path / "p", {"b": 10, "a": 0, "c": 0})
    report = normswap.evaluate(Brightness(3), folder, preprocess=RAW)
    assert [(each.name, each.value) for each in report.classes] == [("a", 1.0), ("b", 1.0), ("c", 0.0)]
    assert report.taken_for() == {"c": ("a", 2)}
    told = "the network's classes have no names: the 3 of the data are taken for them in their order"
    assert report.notes == (told,)
    known = normswap.evaluate(Brightness(3), folder, preprocess=RAW, class_names=["x", "y", "z"])
    assert known.notes == (told.replace("no names", "other names"),)
    numbers = coloured(tmp_path / "n", {"0": 0, "1": 10, "2": 0})
    assert normswap.evaluate(Brightness(3), numbers, preprocess=RAW).notes == ()


def test_names_that_the_network_knows_count_more_than_the_order(tmp_path: Path) -> None:
    folder = coloured(tmp_path / "p", {"zebra": 10, "ant": 30})
    names = ["cow", "zebra", "dog", "ant"]
    report = normswap.evaluate(Brightness(4), folder, preprocess=RAW, class_names=names)
    assert report.score == ("accuracy", 1.0)
    assert [each.name for each in report.classes] == ["zebra", "ant"]
    assert report.notes == ("the 2 classes of the data are found by their names",)


def test_folders_named_by_numbers_may_hold_a_part_of_the_classes(tmp_path: Path) -> None:
    folder = coloured(tmp_path / "p", {"010": 100, "002": 20})
    report = normswap.evaluate(Brightness(12), folder, preprocess=RAW)
    assert report.score == ("accuracy", 1.0)
    assert "by their numbers" in report.notes[0]


def test_classes_that_cannot_be_told_are_an_error_that_names_both_counts(tmp_path: Path) -> None:
    folder = coloured(tmp_path / "p", {"tabby": 10, "dog": 0})
    with pytest.raises(DataError, match="the data has 2 classes, the network tells 4 apart"):
        normswap.evaluate(Brightness(4), folder, preprocess=RAW)
    with pytest.raises(DataError, match="none of them is called 'tabby'"):
        normswap.evaluate(Brightness(4), folder, preprocess=RAW, class_names=["dog", "cow", "a", "b"])


def test_of_train_and_val_folders_the_latter_is_measured_with_the_numbers_of_the_former(tmp_path: Path) -> None:
    coloured(tmp_path / "train", {"a": 0, "b": 10, "c": 20}, count=5)
    coloured(tmp_path / "val", {"c": 20}, count=3)
    report = normswap.evaluate(Brightness(3), tmp_path, preprocess=RAW)
    assert (report.images, report.score[1]) == (3, 1.0)
    assert "val" in report.notes[0]


def test_fewer_images_are_those_that_verify_takes(tmp_path: Path) -> None:
    folder = coloured(tmp_path / "p", {"a": 0, "b": 10}, count=9)
    for i in range(4):
        Image.new("RGB", (8, 8), (20, 20, 20)).save(folder / "a" / f"{i}.png")
    report = normswap.evaluate(Brightness(3), folder, preprocess=RAW, images=6, class_names=["a", "b", "c"])
    batches = open_images(folder, limit=6).batches(RAW)
    right = [float((Brightness(3)(x).argmax(1) == y).sum()) for x, y in batches]
    assert (report.images, report.score[1]) == (6, pytest.approx(sum(right) / 6))
    assert [each.count for each in report.classes] == [3, 3]


def test_unreadable_images_are_left_out_and_named_up_to_max_bad(tmp_path: Path) -> None:
    folder = coloured(tmp_path / "p", {"a": 0, "b": 10})
    (folder / "a" / "0.png").write_bytes(b"none")
    report = normswap.evaluate(Brightness(2), folder, preprocess=RAW)
    assert report.images == 3
    assert len(report.bad) == 1
    with pytest.raises(DataError, match="cannot be read"):
        normswap.evaluate(Brightness(2), folder, preprocess=RAW, max_bad=0)


def test_what_cannot_be_measured_is_told() -> None:
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(DataError, match="a label 9"):
        numbered(torch.eye(3), torch.tensor([0, 1, 9]))
    with pytest.raises(DataError, match="cannot run on the data"):
        normswap.evaluate(nn.Conv2d(5, 2, 1), (x, torch.zeros(4).long()))
    with pytest.raises(NetworkError, match="a classifier gives scores"):
        normswap.evaluate(nn.Conv2d(3, 2, 1), (x, torch.zeros(4).long()))
    with pytest.raises(OptionError, match="batch_size"):
        normswap.evaluate(nn.Flatten(), (x, torch.zeros(4).long()), batch_size=0)
    with pytest.raises(OptionError, match="task"):
        normswap.evaluate(nn.Flatten(), (x, torch.zeros(4).long()), task="regression")  # type: ignore[arg-type]


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.classifier(x)}


@pytest.mark.parametrize(
    ("model", "data", "task", "what"),
    [
        (Given(torch.eye(3)), (torch.arange(3)[:, None].float(), torch.tensor([0, 1, 9])), "classification", "label 9"),
        (Pixels(), [(torch.rand(3, 4, 4), torch.full((4, 4), 7))], "segmentation", "classes from 7 to 7"),
    ],
)
def test_labels_of_no_class_of_the_networks_are_told_without_promising_a_head(
    model: nn.Module, data: Any, task: Any, what: str
) -> None:
    with pytest.raises(DataError, match=what) as error:
        normswap.evaluate(model, data, task=task)
    assert "num_classes" not in str(error.value)
    assert "number the labels as the network does" in str(error.value.hint)


def test_the_iou_of_each_class_is_that_of_an_independent_count() -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 6, 7, generator=generator), torch.rand(3, 5, 4, generator=generator)]
    masks = [torch.randint(0, 4, image.shape[1:], generator=generator) for image in images]
    masks[0][:2] = 255
    torch.manual_seed(2)
    model = Pixels().eval()
    report = normswap.evaluate(model, list(zip(images, masks, strict=True)), task="segmentation")
    with torch.no_grad():
        found = [model(image[None])["out"][0].argmax(0) for image in images]
    true, predicted = (torch.cat([m.flatten() for m in maps]).numpy() for maps in (masks, found))
    known = true != 255
    true, predicted = true[known], predicted[known]
    wanted = {}
    for c in range(5):
        union = ((true == c) | (predicted == c)).sum()
        if union:
            wanted[str(c)] = ((true == c).sum(), ((true == c) & (predicted == c)).sum() / union)
    assert {each.name: (each.count, pytest.approx(each.value)) for each in report.classes} == wanted
    assert report.score == ("mean IoU", pytest.approx(np.mean([iou for _, iou in wanted.values()])))
    assert sum(count for _, _, count in report.confusion) == known.sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_ap_of_each_class_is_that_of_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shapes(tmp_path / "shapes", 12, size=64, seed=3)
    data = normswap.data.open_coco(folder / "annotations.json", folder / "images")
    model = Noisy(data)
    report = normswap.evaluate(model, folder, task="detection", batch_size=5)
    truth = COCO(folder / "annotations.json")
    judged = COCOeval(truth, truth.loadRes(model.results()), "bbox")
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    precision = judged.eval["precision"][:, :, :, 0, 2]
    wanted = [precision[:, :, k][precision[:, :, k] > -1].mean() for k in range(precision.shape[2])]
    assert [each.value for each in report.classes] == pytest.approx(
        wanted, abs=2e-3
    )  # an IoU of float32 or float64 is on this or that side of a limit
    assert report.score == ("mAP", pytest.approx(judged.stats[0], abs=2e-3))
    assert 0.05 < report.score[1] < 0.95
    assert [each.name for each in report.classes] == list(data.categories)
    assert sum(each.count for each in report.classes) == sum(len(p.boxes) for p in data.pictures)


def test_the_same_set_in_every_format_gives_the_same_map(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "shapes", 8, size=64, seed=3)
    model = Noisy(normswap.data.open_coco(folder / "annotations.json", folder / "images"))
    places = (folder, as_yolo(folder, tmp_path / "yolo"), as_voc(folder, tmp_path / "voc"))
    reports = [normswap.evaluate(model, place, task="detection") for place in places]
    assert 0.05 < reports[0].score[1] < 0.95
    for report in reports[1:]:
        assert (report.figures, report.classes) == (reports[0].figures, reports[0].classes)


class Noisy(nn.Module):
    """A detector that knows the truth and moves every box a little."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        generator = torch.Generator().manual_seed(1)
        self.found = []
        for i in range(len(data)):
            image, target = data[i]
            boxes = target["boxes"] + torch.randn(target["boxes"].shape, generator=generator)
            scores = torch.rand(len(boxes), generator=generator)
            self.found.append((image.mean(), int(target["image_id"]), target["labels"], boxes.clamp(0, 64), scores))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        known = [next(f for f in self.found if torch.isclose(f[0], image.mean(), atol=1e-7)) for image in images]
        return [{"boxes": boxes, "labels": labels, "scores": scores} for _, _, labels, boxes, scores in known]

    def results(self) -> list[dict[str, Any]]:
        return [
            {"image_id": i, "category_id": int(label), "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(score)}
            for _, i, labels, boxes, scores in self.found
            for label, (x1, y1, x2, y2), score in zip(labels, boxes.tolist(), scores, strict=True)
        ]


def test_a_detectors_classes_are_found_by_name(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "shapes", 3, size=64, seed=3)
    model = build("fasterrcnn_mobilenet_v3_large_320_fpn")
    names = ["__background__", "triangle", "circle", "square"]
    report = normswap.evaluate(model, folder, task="detection", class_names=names)
    assert [each.name for each in report.classes] == [n for n in names if n in {c.name for c in report.classes}]
    assert "by their names" in report.notes[-1]
    with pytest.raises(OptionError, match="does not work as torchvision's detectors do"):
        normswap.evaluate(Pixels(), folder, task="detection")
