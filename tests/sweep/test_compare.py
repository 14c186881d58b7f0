"""What `normswap.compare` makes of norms, groups and batch sizes."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import normswap
from normswap.sweep.cells import Cell

Pair = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    """Three channels to four classes, with the statistics of its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model.extend([nn.Flatten(), nn.Linear(8, 4)])
    normswap.estimate_statistics(model, samples(64, 0)[0])
    return model.eval()


def samples(count: int, seed: int) -> Pair:
    """Four classes that differ in the brightness of the first channel."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    x = torch.randn(count, 3, 8, 8, generator=draw)
    x[:, 0] += labels.view(-1, 1, 1).float()
    return x, labels


DATA = {"data": samples(16, 1), "eval_data": samples(40, 2)}


def accuracy(model: nn.Module) -> float:
    x, y = DATA["eval_data"]
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def test_a_calibrated_cell_has_the_accuracy_that_convert_and_calibrate_give(tmp_path: Path) -> None:
    model = network()
    report = normswap.compare(model, **DATA, output=tmp_path, norms=["bn", "gn"], groups=[1, 4], images=16)
    assert [result.cell for result in report.results] == [Cell("bn"), Cell("gn", 1), Cell("gn", 4)]
    assert report.results[0].accuracy == pytest.approx(accuracy(model))
    for result, groups in zip(report.results[1:], (1, 4), strict=True):
        by_hand = normswap.convert(model, "gn", groups=groups, eps="auto")
        assert result.converted == pytest.approx(accuracy(by_hand))
        normswap.calibrate(by_hand, model, DATA["data"][0])
        assert result.accuracy == pytest.approx(accuracy(by_hand))


def test_a_trained_cell_is_the_run_that_finetune_makes(tmp_path: Path) -> None:
    model = network()
    report = normswap.compare(
        model, **DATA, output=tmp_path / "all", norms=["gn"], groups=[2], batch_sizes=[4], epochs=2, images=16
    )
    by_hand = normswap.convert(model, "gn", groups=2)
    normswap.calibrate(by_hand, model, DATA["data"][0])
    run = normswap.finetune(by_hand, *DATA.values(), batch_size=4, epochs=2, output=tmp_path / "run")
    (result,) = report.results
    assert result.accuracy == run.figures["val_accuracy"]
    assert result.images == 32
    assert result.folder == tmp_path / "all" / "cells" / "gn-2-batch-4"
    opened = normswap.load(result.folder / "last.safetensors", model=network())
    for name, value in normswap.load(tmp_path / "run" / "last.safetensors", model=network()).state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name


class Recorded(Dataset[Any]):
    """Notes which samples are asked for, in order; may stop the program at one of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.x, self.y = DATA["data"]
        self.seen: list[int] = []
        self.stop_at = stop_at

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Any:
        self.seen.append(index)
        if len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        return self.x[index], int(self.y[index])


def test_every_norm_sees_the_same_images_in_the_same_order(tmp_path: Path) -> None:
    orders = []
    for norm in ("bn", "gn"):
        data = Recorded()
        report = normswap.compare(
            network(),
            data,
            DATA["eval_data"],
            output=tmp_path / norm,
            norms=[norm],
            batch_sizes=[4],
            epochs=2,
            images=16,
        )
        assert not report.failed
        orders.append(data.seen[-32:])
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted([*range(16)] * 2)


def test_a_cell_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    model = network()
    model = nn.Sequential(*model[:4], nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), *model[4:])  # on a map of one position
    report = normswap.compare(model, **DATA, output=tmp_path, norms=["in", "bn"], images=16)
    assert [result.cell.norm for result in report.failed] == ["in"]
    assert "layer cannot be converted" in report.failed[0].error
    assert report.results[1].accuracy is not None
    assert "layer cannot be converted" in (tmp_path / "table.md").read_text()


def test_finished_cells_are_not_made_again_and_others_may_be_added(tmp_path: Path) -> None:
    normswap.compare(network(), **DATA, output=tmp_path, norms=["bn"], images=16)
    kept = tmp_path / "cells" / "bn" / "cell.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "accuracy": 0.125}))
    report = normswap.compare(network(), **DATA, output=tmp_path, norms=["bn", "ln"], images=16)
    assert [result.accuracy == 0.125 for result in report.results] == [True, False]
    anew = normswap.compare(network(), **DATA, output=tmp_path, norms=["bn"], images=16, overwrite=True)
    assert anew.results[0].accuracy != 0.125


def test_ctrl_c_keeps_finished_cells_and_the_rest_comes_out_as_without(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"norms": ["bn", "gn"], "groups": [2], "batch_sizes": [4], "epochs": 2, "images": 16}
    whole = normswap.compare(network(), Recorded(), DATA["eval_data"], output=tmp_path / "whole", **asked)
    data = Recorded(stop_at=75)  # in the second cell's training
    with pytest.raises(normswap.Interrupted) as stop:
        normswap.compare(network(), data, DATA["eval_data"], output=tmp_path / "cut", **asked)
    report = stop.value.report
    assert [result.cell.norm for result in report.results] == ["bn"]
    assert report.interrupted
    assert len((tmp_path / "cut" / "table.csv").read_text().splitlines()) == 2
    report = normswap.compare(network(), Recorded(), DATA["eval_data"], output=tmp_path / "cut", **asked)
    assert [r.accuracy for r in report.results] == [r.accuracy for r in whole.results]
    assert [r.loss for r in report.results] == [r.loss for r in whole.results]


def test_a_training_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"norms": ["gn"], "groups": [2], "batch_sizes": [4], "epochs": 2, "images": 16}
    whole, cut, rest = Recorded(), Recorded(), Recorded()
    normswap.compare(network(), whole, DATA["eval_data"], output=tmp_path / "whole", **asked)
    cut.stop_at = len(whole.seen) - 3  # in the second epoch
    with pytest.raises(normswap.Interrupted):
        normswap.compare(network(), cut, DATA["eval_data"], output=tmp_path / "cut", **asked)
    normswap.compare(network(), rest, DATA["eval_data"], output=tmp_path / "cut", **asked)
    assert len(rest.seen) <= len(whole.seen) - 16


def test_a_comparison_goes_on_under_the_same_conditions_only(tmp_path: Path) -> None:
    model = network()
    normswap.compare(model, **DATA, output=tmp_path, norms=["bn"], images=16)
    with pytest.raises(normswap.OptionError, match=r"is a comparison with seed 0 \(now 1\)"):
        normswap.compare(model, **DATA, output=tmp_path, norms=["bn"], images=16, seed=1)
    other = copy.deepcopy(model)
    other[0].weight.data.mul_(2)
    with pytest.raises(normswap.OptionError, match="is a comparison with network"):
        normswap.compare(other, **DATA, output=tmp_path, norms=["bn"], images=16)


@pytest.mark.usefixtures("pictures")
def test_tables_and_pictures_say_the_same(tmp_path: Path) -> None:
    report = normswap.compare(network(), **DATA, output=tmp_path, norms=["bn", "gn"], groups=[1, 2], images=16)
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    values = json.loads((tmp_path / "table.json").read_text())["cells"]
    lines = (tmp_path / "table.md").read_text().splitlines()[2:]
    for result, row, value, line in zip(report.results, rows, values, lines, strict=True):
        assert float(row["accuracy"]) == value["accuracy"] == result.accuracy
        assert f"{result.accuracy:.4f}" in line
    assert [path.name for path in report.pictures] == ["accuracy-over-groups.png"]
    with Image.open(report.pictures[0]) as picture:
        assert picture.size[0] > 500


@pytest.mark.usefixtures("pictures")
def test_training_draws_error_over_batch_size_and_curves_for_each(tmp_path: Path) -> None:
    report = normswap.compare(network(), **DATA, output=tmp_path, norms=["bn"], batch_sizes=[4, 8], epochs=1, images=16)
    names = [path.name for path in report.pictures]
    assert names == ["error-over-batch-size.png", "curves-batch-4.png", "curves-batch-8.png"]
    assert all(path.is_file() for path in report.pictures)


def test_frozen_is_compared_too_where_cells_are_trained(tmp_path: Path) -> None:
    report = normswap.compare(network(), **DATA, output=tmp_path, batch_sizes=[8], epochs=1, images=16)
    assert [result.cell.series for result in report.results] == ["bn", "frozen", "gn-auto"]


def test_the_network_stays_as_it_is(tmp_path: Path) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    normswap.compare(model, **DATA, output=tmp_path, norms=["gn"], groups=[2], batch_sizes=[8], epochs=1, images=16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model[1], nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"epochs": 2}, "epochs is of training, and without batch_sizes nothing is trained"),
        ({"batch_sizes": [2], "epochs": 0}, "epochs must be a positive integer"),
        ({"eval_data": None}, "no validation images to compare on"),
        ({"images": 0}, "images must be a positive integer"),
        ({"optimizer": "adam"}, "optimizer must be 'adamw' or 'sgd'"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(normswap.NormswapError, match=what):
        normswap.compare(network(), **{**DATA, "output": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    assert (tmp_path / "comparison" / "table.md").is_file()
