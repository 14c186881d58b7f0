"""What a run says of each class when it ends: the figures of its last validation, by independent counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from detectors import shapes_folder
from test_detection_task import tiny
from test_segmentation_task import pixels
from torch import Tensor, nn

import normswap
from normswap.finetuning.tasks.classification import Accuracy
from normswap.finetuning.tasks.detection import MeanPrecision


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_accuracies_and_confusion_are_those_of_the_network_that_is_returned(
    gn: nn.Module, data: Any, ema: float
) -> None:
    report = normswap.finetune(gn, *data, batch_size=4, steps=6, lr=0.02, ema=ema, device="cpu")
    x, y = data[1]
    with torch.no_grad():
        predicted = gn.eval()(x).argmax(1).tolist()
    pairs = Counter(zip(y.tolist(), predicted, strict=True))
    assert {(true, other): count for true, other, count in report.confusion} == pairs
    rights = {str(c): pairs[c, c] / int((y == c).sum()) for c in y.unique().tolist()}
    assert {each.name: each.value for each in report.classes} == rights
    assert report.worst[0].value == min(rights.values()) < 1
    assert f"worst of {len(rights)} classes: {report.worst[0].name}" in str(report)


@pytest.mark.usefixtures("pictures")
def test_the_matrix_is_drawn_beside_the_curves_and_anew_when_a_run_goes_on(
    gn: nn.Module, data: Any, tmp_path: Path
) -> None:
    report = normswap.finetune(gn, *data, batch_size=4, steps=2, output=tmp_path / "run", device="cpu")
    assert report.matrix == tmp_path / "run" / "confusion.png"
    assert report.matrix.read_bytes().startswith(b"\x89PNG")
    shown = report._repr_html_()
    assert shown.count("data:image/png;base64,") == 2
    assert "<th>worst classes</th>" in shown
    again = normswap.finetune(gn, *data, batch_size=4, steps=2, output=tmp_path / "run", device="cpu", resume=True)
    assert (again.classes, again.matrix) == ((), report.matrix)  # nothing was measured; the picture is of before


@pytest.mark.usefixtures("pictures")
def test_a_notebook_shows_the_curves_and_the_matrix_of_a_run_without_a_folder_too(gn: nn.Module, data: Any) -> None:
    report = normswap.finetune(gn, *data, batch_size=4, steps=2, device="cpu")
    assert (report.curves, report.matrix) == (None, None)
    assert [name for name in ("curves", "confusion", "examples") if f'alt="{name}"' in report._repr_html_()] == [
        "curves", "confusion",
    ]  # fmt: skip
    assert [line["step"] for line in report.history if "val_accuracy" in line] == [0, 2]
    assert not {"history", "panels"} & set(report.to_dict())


def test_without_validation_there_are_no_classes(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    single = [(data[0][0][0], 1)]
    report = normswap.finetune(gn, single, batch_size=1, steps=1, output=tmp_path / "run", device="cpu")
    assert (report.classes, report.confusion, report.matrix) == ((), (), None)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_the_classes_of_boxes_and_masks_are_those_of_evaluate(task: Any, tmp_path: Path) -> None:
    folder = shapes_folder(tmp_path / "shapes", 64)
    model = tiny() if task == "detection" else pixels()
    report = normswap.finetune(model, folder, task=task, steps=4, batch_size=2, lr=0.02, device="cpu")
    names = ["background", "circle", "square", "triangle"]
    found = normswap.evaluate(model, folder, task=task)
    assert [each.count for each in report.classes] == [each.count for each in found.classes]
    assert [each.value for each in report.classes] == pytest.approx([each.value for each in found.classes])
    assert report.confusion == found.confusion
    if task == "detection":
        assert {each.name for each in report.classes} <= set(names[1:])


def test_several_processes_put_their_classes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = torch.randn(30, 4), torch.arange(30) % 4
    scores[3] = torch.nan
    meters = [Accuracy() for _ in range(4)]
    for meter, part in zip(meters, (slice(0, 10), slice(10, 30), slice(0, 0), slice(0, 30)), strict=True):
        if len(labels[part]):
            meter.add(nn.Identity(), (scores[part], labels[part]))
    whole = meters[3].by_class("abcd")
    assert sum(count for *_, count in whole.confusion) == 30
    assert whole.names == ("a", "b", "c", "d", "NaN")
    parts = [(meter._answers.known, meter._answers.cells()) for meter in meters[:3]]
    monkeypatch.setattr("normswap.finetuning.tasks.classification.gathered", lambda mine: parts)
    assert meters[2].by_class("abcd") == whole


def test_boxes_of_each_class_are_counted_over_all_processes_without_crowds(monkeypatch: pytest.MonkeyPatch) -> None:
    target = {"boxes": torch.tensor([[0.0, 0, 8, 8], [0, 0, 4, 4]]), "labels": torch.tensor([1, 3])}
    target["iscrowd"] = torch.tensor([0, 1])
    meter = MeanPrecision()
    meter.add(_Given({**target, "scores": torch.ones(2)}), ([torch.zeros(3, 8, 8)], [target]))
    found = meter.by_class(("a", "b", "c"))
    assert [(each.name, each.count, each.value) for each in found.classes] == [("a", 1, pytest.approx(1))]
    mine = (meter._masks, meter._metric.metric_state, meter._boxes)
    empty = (False, None, Counter())
    monkeypatch.setattr("normswap.finetuning.tasks.detection.gathered", lambda value: [mine, empty, mine])
    assert meter.by_class(("a", "b", "c")).classes[0].count == 2


class _Given(nn.Module):
    """Finds what it is told to."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        super().__init__()
        self.found = found

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self.found]
