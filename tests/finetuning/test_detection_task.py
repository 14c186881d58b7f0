"""Detectors in training: losses, mAP, new heads, what is written, and what wrong data is told."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from detectors import shapes_folder
from torch import Tensor, nn
from torchvision.models import detection as zoo

import normswap
from normswap.conversion.record import record_of
from normswap.data import open_coco, shapes, write_shapes
from normswap.errors import DataError, NormswapError, OptionError
from normswap.finetuning.datasets.boxes import flipped
from normswap.finetuning.tasks.detection import Detection, MeanPrecision
from normswap.heads.classifier import Head, resize_head
from normswap.heads.dense import find_predictor

NETS = '''
import torch
from torch import nn
from normswap.detection import detector


class Stem(nn.Module):
    """One map of stride 8."""

    out_channels = 32

    def __init__(self, norm):
        super().__init__()
        layers = []
        for inputs, outputs in ((3, 8), (8, 16), (16, 32)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), norm(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return {"0": self.body(x)}


def tiny(norm=nn.BatchNorm2d, num_classes=4, kind="fasterrcnn"):
    torch.manual_seed(0)
    few = {
        "rpn_batch_size_per_image": 16, "box_batch_size_per_image": 8, "rpn_pre_nms_top_n_train": 20,
        "rpn_post_nms_top_n_train": 10, "rpn_pre_nms_top_n_test": 20, "rpn_post_nms_top_n_test": 10,
    }
    size = {"size": 64} if kind == "ssd" else {"min_size": 64, "max_size": 64}
    return detector(kind, backbone=Stem(norm), num_classes=num_classes, norm=None, **size,
                    anchor_sizes=None if kind == "fcos" else (16,), **(few if "rcnn" in kind else {})).eval()


def grouped():
    return tiny(lambda channels: nn.GroupNorm(2, channels))
'''
exec(NETS)  # the same for tests in this process and for those that start others
tiny: Any = globals()["tiny"]
grouped: Any = globals()["grouped"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_folder(tmp_path_factory.mktemp("shapes"), 64)


def train(model: nn.Module, data: Any, evaluation: Any = None, **more: Any) -> Any:
    settings = {"task": "detection", "device": "cpu", "steps": 2, "batch_size": 2, **more}
    return normswap.finetune(model, data, evaluation, **settings)


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in found]


# --- figures ------------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """Predicts what it is told to."""

    def __init__(self, found: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.found = found

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return self.found


def test_map_is_that_of_the_example_in_torchmetrics_documentation() -> None:
    found = {"boxes": [[258.0, 41.0, 606.0, 285.0]], "scores": [0.536], "labels": [0]}
    true = {"boxes": [[214.0, 41.0, 562.0, 285.0]], "labels": [0]}
    meter = MeanPrecision()
    prediction = {k: torch.tensor(v) for k, v in found.items()}
    meter.add(Given([prediction]), ([torch.zeros(3, 600, 700)], [{k: torch.tensor(v) for k, v in true.items()}]))
    figures = meter.result(lambda value: value)
    assert figures == pytest.approx({"val_map": 0.6, "val_map_50": 1.0, "val_map_75": 1.0})


def test_masks_count_by_their_own_overlap() -> None:
    """Boxes that agree and masks that overlap by half: at IoU 0.5 the masks are right, on average for 1 of 10."""
    box, mask = torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.ones(1, 8, 8)
    half = mask.clone()
    half[:, :, 4:] = 0
    prediction = {"boxes": box, "labels": torch.ones(1).long(), "scores": torch.ones(1), "masks": half[:, None]}
    target = {"boxes": box, "labels": torch.ones(1).long(), "masks": mask.byte()}
    meter = MeanPrecision()
    meter.add(Given([prediction]), ([torch.zeros(3, 8, 8)], [target]))
    figures = meter.result(lambda value: value)
    assert figures["val_map"] == pytest.approx(1.0)
    assert figures["val_mask_map"] == pytest.approx(0.1)
    assert figures["val_mask_map_50"] == pytest.approx(1.0)


def test_no_object_at_all_is_an_error() -> None:
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    meter = MeanPrecision()
    meter.add(Given([{**nothing, "scores": torch.zeros(0)}]), ([torch.zeros(3, 8, 8)], [nothing]))
    with pytest.raises(DataError, match="no mAP"):
        meter.result(lambda value: value)


def test_the_loss_is_the_sum_of_the_networks_losses_and_each_is_a_figure() -> None:
    torch.manual_seed(0)
    model = tiny().train()
    items = [item for item in shapes(6, 64, seed=0) if len(item[1]["labels"])][:2]
    task = Detection()
    torch.manual_seed(5)
    outcome = task.outcome(model, task.collate(items))
    torch.manual_seed(5)
    losses = model([i for i, _ in items], [{k: t[k] for k in ("boxes", "labels")} for _, t in items])
    losses = {k: float(v.detach()) for k, v in losses.items()}
    assert float(outcome.loss.detach()) == pytest.approx(sum(losses.values()), rel=1e-5)
    assert {k: float(v) / 2 for k, v in outcome.sums.items()} == pytest.approx(losses)


# --- a run --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pictures")
def test_a_run_writes_losses_map_and_pictures(folder: Path, tmp_path: Path) -> None:
    report = train(tiny(), folder, output=tmp_path / "run", epochs=1, steps=None)
    found = lines(tmp_path / "run")
    assert found[0].keys() == {"step", "epoch", "val_map", "val_map_50", "val_map_75"}
    parts = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert parts <= found[1].keys()
    assert found[1]["loss"] == pytest.approx(sum(found[1][name] for name in parts), rel=1e-4)
    assert report.best_name == "val_map"
    for path in (report.curves, report.examples):
        assert path is not None
        assert path.read_bytes().startswith(b"\x89PNG")
    again = normswap.load(report.last_file, model=tiny())
    images = [shapes(1, 64, seed=3)[0][0]]
    assert again(images)[0]["boxes"].shape[1] == 4


def test_training_lowers_the_loss() -> None:
    data = shapes(4, 64, seed=0)
    model = grouped()
    report = train(model, data, steps=30, lr=3e-3, augment="none")
    assert report.figures["loss"] < 0.7 * _first_loss(data)


def _first_loss(data: Any) -> float:
    return float(train(grouped(), data, steps=1, augment="none").figures["loss"])


@pytest.mark.parametrize("kind", ["maskrcnn", "retinanet", "fcos", "ssd"])
def test_other_detectors_train_too(kind: str, folder: Path) -> None:
    report = train(tiny(kind=kind), folder, steps=1, batch_size=1)
    assert {name for name in report.figures if name.startswith("loss_")} >= (
        {"loss_mask"} if kind == "maskrcnn" else {"loss_classification", "loss_bbox_regression"}
    )
    assert ("val_mask_map" in report.figures) == (kind == "maskrcnn")


def test_an_interrupted_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    common = {"steps": 6, "ema": 0.9, "batch_size": 1}
    train(tiny(), folder, output=tmp_path / "whole", **common)

    def interrupt(progress: Any) -> None:
        if progress.step > 0:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), folder, output=tmp_path / "cut", progress=interrupt, **common)
    train(tiny(), folder, output=tmp_path / "cut", resume=True, **common)
    first, second = (normswap.load(tmp_path / n / "last.safetensors", model=tiny()) for n in ("whole", "cut"))
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_images_of_different_sizes_and_worker_processes(folder: Path) -> None:
    mixed = torch.utils.data.ConcatDataset([shapes(2, 64, seed=0), shapes(2, 48, seed=1)])
    report = train(tiny(), mixed, shapes(2, 56, seed=2), workers=1)
    assert "val_map" in report.figures


@pytest.mark.slow
def test_compile_takes_the_backbone_for_the_time_of_the_run(folder: Path) -> None:
    model = tiny()
    plain = train(tiny(), folder, augment="none").figures
    compiled = train(model, folder, augment="none", compile=True).figures
    assert compiled == pytest.approx(plain, rel=1e-2, abs=1e-3)
    assert model.backbone._compiled_call_impl is None


def test_bf16_and_frozen_norms_run(folder: Path) -> None:
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    report = train(model, folder, precision="bf16", freeze_stats=True)
    assert torch.isfinite(torch.tensor(report.figures["loss"]))
    assert before
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)


def test_train_head_leaves_the_backbone(folder: Path) -> None:
    model = tiny()
    before = {k: v.clone() for k, v in model.named_parameters()}
    train(model, folder, train="head")
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"rpn", "roi_heads"}


# --- heads --------------------------------------------------------------------------------------------------------


def test_a_new_head_for_the_categories_of_the_data_is_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    model = tiny(num_classes=9)
    train(model, folder, output=tmp_path / "run")
    assert model.roi_heads.box_predictor.cls_score.out_features == 4
    assert model.roi_heads.box_predictor.bbox_pred.out_features == 16
    again = normswap.load(tmp_path / "run" / "last.safetensors", model=tiny(num_classes=9))
    assert again.roi_heads.box_predictor.cls_score.out_features == 4


@pytest.mark.parametrize("name", [
    "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
])  # fmt: skip
def test_new_heads_have_the_shapes_that_torchvision_gives_them(name: str) -> None:
    def shapes_of(classes: int) -> dict[str, torch.Size]:
        with torch.device("meta"):
            model = _built(name, classes)
        return {k: v.shape for k, v in model.state_dict().items()}

    with torch.device("meta"):
        model = _built(name, 91)
    found = find_predictor(model)
    assert found is not None
    assert found[1] == 91
    resize_head(model, Head(found[0], 5))
    assert find_predictor(model) == (found[0], 5)
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes_of(5)


def _built(name: str, classes: int) -> nn.Module:
    model: nn.Module = getattr(zoo, name)(weights=None, weights_backbone=None, num_classes=classes)
    return model


def test_a_network_whose_scores_are_unknown_gets_no_new_head(folder: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, images: Any, targets: Any = None) -> Any:
            return {"size": sum(self.conv(i).square().mean() for i in images)}

    assert "loss_size" in train(Own(), shapes(2, 32)).figures
    with pytest.raises(OptionError, match="no new head"):
        train(Own(), shapes(2, 32), num_classes=7)


# --- data ---------------------------------------------------------------------------------------------------------


def test_mirroring_moves_boxes_and_masks_with_the_image() -> None:
    image, target = next(item for item in shapes(9, 32, seed=0) if len(item[1]["labels"]))
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        picture, changed = flipped(image, target)
        seen.add(turned := not torch.equal(picture, image))
        assert torch.equal(picture, image.flip(-1) if turned else image)
        for box, mask in zip(changed["boxes"], changed["masks"], strict=True):
            columns = torch.nonzero(mask.any(0)).flatten()
            assert (box[0], box[2]) == (columns[0], columns[-1] + 1)
    assert seen == {True, False}


def test_cocos_own_layout_is_found(folder: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(folder / part / "images", tmp_path / f"{part}2017")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        shutil.copy(folder / part / "annotations.json", tmp_path / "annotations" / f"instances_{part}2017.json")
    sets = Detection().open(tiny(), tmp_path, None, seed=0)
    assert (len(sets.train), len(sets.validation)) == (8, 3)
    assert sets.classes == ("circle", "square", "triangle")


def test_a_tenth_is_held_back_where_there_is_no_validation(folder: Path) -> None:
    sets = Detection().open(tiny(), folder / "train", None, seed=0)
    assert len(sets.train) + len(sets.validation) == 8
    assert any(len(sets.validation[i][1]["boxes"]) for i in range(len(sets.validation)))
    assert "held back" in sets.note


def test_crowds_count_neither_for_nor_against_a_detector(tmp_path: Path) -> None:
    """Compared with a file in which they are not crowds: what is found there would be right."""
    place = write_shapes(tmp_path / "shapes", 6, size=64, seed=0)
    file = place / "annotations.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"][::2]:
        annotation["iscrowd"] = 1
    everything = open_coco(file, place / "images")
    file.write_text(json.dumps(content))
    validation = Detection().open(tiny(), shapes(2, 64), place, seed=0).validation
    assert sum(int(validation[i][1]["iscrowd"].sum()) for i in range(6)) == len(content["annotations"][::2])
    meter = MeanPrecision()
    for i in range(6):
        found = {**everything[i][1], "scores": torch.ones(len(everything[i][1]["labels"]))}
        meter.add(Given([found]), ([validation[i][0]], [validation[i][1]]))
    assert meter.result(lambda value: value)["val_map"] == pytest.approx(1)


def test_categories_are_told_by_their_names(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "val", tmp_path / "val")
    text = json.loads((tmp_path / "val" / "annotations.json").read_text())
    names = {1: "triangle", 2: "circle", 3: "square"}  # as if another tool had numbered them
    back = {"triangle": 1, "circle": 2, "square": 3}
    original = {c["id"]: c["name"] for c in text["categories"]}
    text["categories"] = [{"id": i, "name": n} for i, n in names.items()]
    for a in text["annotations"]:
        a["category_id"] = back[original[a["category_id"]]]
    (tmp_path / "val" / "annotations.json").write_text(json.dumps(text))
    sets = Detection().open(tiny(), folder / "train", tmp_path / "val", seed=0)
    same = Detection().open(tiny(), folder, None, seed=0)
    for (_, a), (_, b) in zip(sets.validation, same.validation, strict=True):
        assert torch.equal(a["labels"], b["labels"])


def test_an_unreadable_image_is_named_and_replaced(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    bad = sorted((tmp_path / "data" / "train" / "images").iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:60])
    report = train(tiny(), tmp_path / "data", epochs=1, steps=None)
    assert len(report.bad) == 1
    assert bad.name in report.bad[0]
    with pytest.raises(DataError, match=f"(?s)cannot be read.*{bad.name}"):
        train(tiny(), tmp_path / "data", epochs=1, steps=None, max_bad=0)


IMAGE = torch.zeros(3, 32, 32)
BOX, LABEL = torch.tensor([[1.0, 1.0, 9.0, 9.0]]), torch.tensor([1])


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((IMAGE, {"boxes": BOX}), "needs boxes and labels"),
        ((IMAGE, [{"bbox": [1, 2, 3, 4]}]), "needs boxes and labels"),
        ((IMAGE.byte(), {"boxes": BOX, "labels": LABEL}), "float"),
        ((IMAGE, {"boxes": BOX[:, [2, 1, 0, 3]], "labels": LABEL}), "x1 < x2"),
        ((IMAGE, {"boxes": BOX, "labels": LABEL + 3}), "knows 1 to 3"),
        ((IMAGE, {"boxes": BOX, "labels": LABEL - 1}), "labels from 0"),
        ((IMAGE, {"boxes": BOX, "labels": LABEL.float()}), "int64"),
    ],
)
def test_wrong_samples_are_named(sample: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train(tiny(), [sample, sample])


def test_a_folder_without_annotations_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotations\.json"):
        train(tiny(), tmp_path)


def test_what_does_not_go_with_detection_is_refused(folder: Path) -> None:
    for option in ({"distil": 0.5}, {"label_smoothing": 0.1}, {"task": "tracking"}):
        with pytest.raises(NormswapError):
            train(tiny(), folder, **option)
    with pytest.raises(DataError, match="keypoints"):
        train(tiny(kind="keypointrcnn"), folder)


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_network_that_takes_no_lists_of_images_is_told_of(evaluated: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with pytest.raises(OptionError, match="does not work as torchvision's detectors do"):
        train(model, shapes(4, 32), shapes(2, 32, seed=1) if evaluated else None)


@pytest.mark.parametrize(
    "failing", [{"train": "nothing.*"}, {"output": "old"}, {"augment": "none", "device": "cpu", "data": "broken"}]
)
def test_a_run_that_does_not_begin_leaves_network_and_folder_alone(
    folder: Path, tmp_path: Path, failing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "state.pt").write_text("an older run")
    model = normswap.convert(tiny(num_classes=7), rules={"*": "keep"})
    head, before = model.roi_heads.box_predictor, {n: t.clone() for n, t in model.state_dict().items()}
    data, evaluation = folder, None
    if failing.pop("data", None):
        image, target = torch.rand(3, 64, 64), {"boxes": torch.ones(1, 4), "labels": torch.ones(1).long()}
        data, evaluation = folder / "train", [(image, target)] * 2
        failing = {**failing, "output": "old", "overwrite": True, "num_classes": 4}
    with pytest.raises(NormswapError):
        train(model, data, evaluation, **failing)
    assert model.roi_heads.box_predictor is head
    assert record_of(model).notes == {}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert (tmp_path / "old" / "state.pt").read_text() == "an older run"
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["state.pt"]


def test_a_classifier_is_told_what_a_detector_gives() -> None:
    class Classifier(nn.Module):
        def forward(self, images: Any, targets: Any) -> Tensor:
            return torch.zeros(1, requires_grad=True)

    model = Classifier()
    model.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(OptionError, match="dict of losses"):
        train(model, shapes(2, 32))


def test_a_detector_is_distilled_on_a_coco_file(folder: Path) -> None:
    data = open_coco(folder / "train" / "annotations.json", folder / "train" / "images")
    original = tiny()
    model = normswap.convert(original, "gn", groups=2)
    report = normswap.distil(model, original, data, steps=2, batch_size=3)
    assert (report.steps, report.images) == (2, 8)
    assert 0 < report.loss_last < float("inf")
