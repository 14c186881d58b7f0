"""The table of epochs, and the curves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from finetuned import lines
from torch import nn

import normswap
from normswap.display.progress import Lines
from normswap.finetuning.output.epoch_table import EpochTable, Row
from normswap.finetuning.output.metrics_log import _plot
from normswap.finetuning.output.panel import Panel
from normswap.finetuning.output.report import Progress, Teller
from normswap.finetuning.tasks.classification import Classification
from normswap.finetuning.tasks.segmentation import Segmentation


def rows_of(gn: nn.Module, data: Any, **said: Any) -> list[Row]:
    found: list[Row] = []

    def note(now: Progress) -> None:
        found.extend([] if now.row is None else [now.row])

    normswap.finetune(gn, *data, batch_size=4, device="cpu", progress=note, **said)
    return found


def test_every_epoch_is_a_row_with_the_mean_of_its_losses(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    said = {"batch_size": 1, "epochs": 3, "lr": 1e-3, "output": tmp_path / "run", "device": "cpu"}
    found: list[Progress] = []
    normswap.finetune(gn, *data, **said, progress=found.append)
    rows = [now.row for now in found if now.row is not None]
    written = lines(tmp_path / "run")
    losses = {line["step"]: line["loss"] for line in written if "loss" in line}  # each over 20 steps
    assert [(row.epoch, row.step) for row in rows] == [(0, 0), (1, 40), (2, 80), (3, 120)]
    for row in rows[1:]:
        assert row.loss == pytest.approx((losses[row.step - 20] + losses[row.step]) / 2, rel=1e-4)
    measured = [(line["val_loss"], line["val_accuracy"]) for line in written if "val_loss" in line]
    for row, figures in zip(rows, measured, strict=True):
        assert tuple(row.figures) == ("val_loss", "val_accuracy")
        assert tuple(row.figures.values()) == pytest.approx(figures, rel=1e-4)
    rates = {line["step"]: line["lr"] for line in written if "lr" in line}
    assert [row.lr for row in rows[1:]] == pytest.approx([rates[row.step] for row in rows[1:]], rel=1e-4)
    assert (rows[0].loss, rows[0].lr, rows[0].best) == (None, None, True)


def test_the_star_is_where_the_best_network_is(gn: nn.Module, data: Any) -> None:
    rows = rows_of(gn, data, epochs=5, lr=0.01, monitor="loss")
    least = float("inf")
    for row in rows:
        assert row.best == (row.figures["val_loss"] < least)
        least = min(least, row.figures["val_loss"])


def test_without_validation_the_rows_are_of_training_alone(gn: nn.Module, data: Any) -> None:
    rows = rows_of(gn, (data[0],), epochs=2)
    assert [(row.epoch, dict(row.figures), row.best) for row in rows] == [(1, {}, False), (2, {}, False)]
    assert all(row.loss is not None for row in rows)


def test_columns_stand_below_their_titles() -> None:
    table = EpochTable()
    rows = [
        Row(0, 0, None, {"val_loss": 2.5, "val_pixel_accuracy": 0.1}, None, 1.234, True),
        Row(1, 120000, 12345.678, {"val_loss": float("nan"), "val_pixel_accuracy": 1.0}, 1.25e-4, 7384.0, False),
        Row(12.5, 1500000, 0.00001, {"val_loss": 0.25, "val_pixel_accuracy": 1.0}, 1e-10, 75.0, True),
    ]
    assert [text for row in rows for text in table.lines(row)] == [
        "epoch   steps  train loss  val loss  val pixel accuracy        lr     time",
        "    0       0           -    2.5000              0.1000         -    1.2 s  *",
        "    1  120000    1.23e+04       nan              1.0000  1.25e-04  2:03:04",
        " 12.5  1500000      0.0000    0.2500              1.0000  1.00e-10     1:15  *",
    ]


def test_a_pipe_gets_the_table_too() -> None:
    stream = io.StringIO()
    tell = Teller(Lines("training", stream))
    row = Row(1, 10, 0.5, {"val_loss": 0.25}, 1e-3, 2.0, True)
    tell(Progress(10, 20, 1.0, {"val_loss": 0.25}, 1.0, 0, None, validation=True, row=row))
    tell(Progress(11, 20, 1.1, {"loss": 0.25}, 1.0, 0, None))
    assert [line.split() for line in stream.getvalue().splitlines()] == [
        ["epoch", "steps", "train", "loss", "val", "loss", "lr", "time"],
        ["1", "10", "0.5000", "0.2500", "1.00e-03", "2.0", "s", "*"],
    ]


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("task", [Classification, Segmentation])
def test_training_and_validation_share_their_axes(task: Any) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    lines = [{"epoch": i / 2, "step": i, "loss": 1 / (i + 1)} for i in range(5)]
    lines += [{"epoch": float(i), "step": 2 * i, "val_loss": 2.0 - i} for i in range(3)]
    (panel,) = (panel for panel in task.panels if "loss" in panel.names)
    _plot(axes, lines, panel, ("val_loss", 4))
    shown = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert shown == {"training": [0, 0.5, 1, 1.5, 2], "validation": [0, 1, 2], "best, 0": [2]}


@pytest.mark.usefixtures("pictures")
def test_a_star_has_its_legend_beside_a_single_line_too() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    measured = [{"epoch": float(i), "step": 2 * i, "val_map": i / 4} for i in range(3)]
    _plot(axes, measured, Panel("mAP", ("val_map",)), ("val_map", 4))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["validation", "best, 0.5"]
