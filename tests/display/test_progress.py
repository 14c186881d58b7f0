from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.display.progress import Line, _Notebook, duration, line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


FIGURES = "loss 0.532, accuracy 0.812, 1.2e+03 images/s, 0.54 GiB"


@pytest.mark.parametrize("columns", [12, 20, 30, 40, 60, 80, 120, 200])
def test_a_line_keeps_step_and_time_at_any_width_and_never_wraps(columns: int) -> None:
    shown = line("training", 120, 3000, 754.0, FIGURES, columns)
    assert len(shown) <= columns
    assert "120/3000 12:34 left"[:columns] in shown
    assert ("━" in shown) == (columns >= 80)
    assert ("training" in shown) == (columns >= 30)
    assert (FIGURES in shown) == (columns >= 120)


def test_the_bar_is_full_at_the_end_and_empty_at_the_start() -> None:
    assert "─" not in line("x", 10, 10, 0.0, "", 80)
    assert "━" not in line("x", 0, 10, None, "", 80)


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]


def test_a_terminal_line_is_overwritten_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    shown = Line("work", stream)
    shown(1, 2, "loss 1")
    shown.above("kept")
    shown(2, 2, "loss 0")
    shown.close()
    parts = stream.getvalue().split("\r\x1b[2K")
    assert parts[2] == "kept\n"
    assert parts[-1] == ""
    assert all(len(part) < 40 for part in parts)


def test_what_is_left_counts_from_the_beginning_of_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    clock = iter([0.0, 100.0, 200.0, 201.0, 202.0])
    monkeypatch.setattr("normswap.display.progress.time.monotonic", lambda: next(clock))
    stream = Terminal()
    shown = Line("work", stream)
    for done, total in ((0, 2), (2, 2), (1, 3), (2, 3)):
        shown(done, total)
    assert "2/3 0:01 left" in stream.getvalue()


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 2)).eval()


def calibrate(**options: Any) -> None:
    torch.manual_seed(0)
    model = net()
    converted = normswap.convert(model, to="gn", groups=2)
    normswap.calibrate(converted, model, torch.randn(6, 3, 8, 8), batch_size=2, **options)


def distil(**options: Any) -> None:
    model = net()
    converted = normswap.convert(model, to="gn", groups=2)
    normswap.distil(converted, model, torch.randn(6, 3, 8, 8), batch_size=2, steps=3, **options)


def finetune(**options: Any) -> None:
    pytest.importorskip("accelerate")
    data = torch.randn(8, 3, 8, 8), torch.arange(8) % 2
    normswap.finetune(net(), data, data, batch_size=4, steps=2, device="cpu", freeze_stats=True, **options)


@pytest.mark.parametrize("work", [calibrate, distil, finetune])
def test_long_work_shows_itself_on_a_terminal_and_is_silent_elsewhere(
    work: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for stream, options, seen in (
        (Terminal(), {}, True),
        (Terminal(), {"progress": False}, False),
        (io.StringIO(), {}, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        work(**options)
        assert ("ing " in stream.getvalue()) is seen


def test_calibrate_tells_a_function_of_batches_and_norms() -> None:
    told: list[tuple[int, int]] = []
    calibrate(progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 4) for done in range(1, 5)]


class Cell:
    """What a notebook shows below a cell: outputs, each of which may be replaced."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, str]] = []

    def __call__(self, shown: dict[str, str], *, raw: bool, display_id: bool) -> Cell:
        self.outputs.append(shown)
        return self

    def update(self, shown: dict[str, str], *, raw: bool) -> None:
        self.outputs[-1] = shown


def test_a_notebooks_cell_has_one_output_which_keeps_what_is_to_stay(capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell()
    told = _Notebook("training", cell)
    for step in range(1, 200):
        told(step, 200, "loss 0.5")
        if step % 50 == 0:
            told.above(f"epoch {step // 50}: <accuracy>")
    assert len(cell.outputs) == 1
    assert "training" in cell.outputs[0]["text/plain"]
    told.close()
    assert cell.outputs[0]["text/plain"] == "\n".join(f"epoch {n}: <accuracy>" for n in (1, 2, 3))
    assert "epoch 3: &lt;accuracy&gt;</pre>" in cell.outputs[0]["text/html"]
    assert capsys.readouterr() == ("", "")


def test_work_that_leaves_nothing_leaves_an_empty_output() -> None:
    cell = Cell()
    told = _Notebook("calibrating", cell)
    told(1, 2)
    told.close()
    assert cell.outputs == [{"text/plain": "", "text/html": ""}]
