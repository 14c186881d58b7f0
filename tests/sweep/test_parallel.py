"""Cells in several processes: the table of one, whatever ends, dies or fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compare import DATA, network
from torch import nn
from torch.utils.data import Dataset

import normswap
from normswap.sweep.cells import Cell
from normswap.sweep.parallel import _alone


class Deadly(Dataset[Any]):
    """Kills the process that trains on it in the second epoch, unless that is the process that made it."""

    def __init__(self) -> None:
        self.x, self.y = DATA["data"]
        self.seen = 0
        self.safe = os.getpid()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Any:
        self.seen += 1
        if os.getpid() != self.safe and self.seen == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.x[index], int(self.y[index])


def rows(report: Any) -> list[tuple[Any, ...]]:
    return [(r.cell, r.score, r.converted, r.best, r.loss, r.images, r.error) for r in report.results]


def test_two_processes_make_the_table_of_one(tmp_path: Path) -> None:
    model = network()
    model = nn.Sequential(*model[:4], nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), *model[4:])  # on a map of one position
    asked: Any = {"norms": ["bn", "in", "gn"], "groups": [1, 2], "images": 16}
    alone = normswap.compare(model, **DATA, output=tmp_path / "one", **asked)
    both = normswap.compare(model, **DATA, output=tmp_path / "two", devices=["cpu", "cpu"], **asked)
    assert rows(both) == rows(alone)
    assert [result.cell.norm for result in both.failed] == ["in"]
    assert [len((tmp_path / name / "table.csv").read_text().splitlines()) for name in ("one", "two")] == [5, 5]


@pytest.mark.slow
def test_a_process_that_dies_is_the_error_of_its_cell_and_the_others_go_on(tmp_path: Path) -> None:
    asked: Any = {"batch_sizes": [4], "epochs": 2, "images": 16, "output": tmp_path}
    report = normswap.compare(network(), Deadly(), DATA["eval_data"], norms=["bn", "frozen"], devices=["cpu"], **asked)
    errors = [result.error for result in report.results]
    assert errors == ["the process on cpu ended (SIGKILL, perhaps for want of memory)"] * 2
    again = normswap.compare(network(), Deadly(), DATA["eval_data"], norms=["bn"], **asked)
    assert again.results[0].score is not None


def test_what_cannot_be_sent_to_a_process_is_told(tmp_path: Path) -> None:
    model = network()
    model.register_forward_hook(lambda *args: None)
    with pytest.raises(normswap.OptionError, match="devices: network and data cannot be handed to other processes"):
        normswap.compare(model, **DATA, output=tmp_path, norms=["bn"], images=16, devices=["cpu", "cpu"])


def test_a_device_that_is_not_there_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(normswap.OptionError, match="device 'cuda:7' cannot be used"):
        normswap.compare(network(), **DATA, output=tmp_path / "out", norms=["bn"], devices=["cpu", "cuda:7"])
    assert not (tmp_path / "out").exists()


def test_a_process_sees_no_gpu_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the parent numbers them, which may see a part of them itself."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (_alone("cpu"), os.environ.get("CUDA_VISIBLE_DEVICES")) == ("cpu", None)
    assert (_alone("cuda:1"), os.environ["CUDA_VISIBLE_DEVICES"]) == ("cuda", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert (_alone("cuda:1"), os.environ["CUDA_VISIBLE_DEVICES"]) == ("cuda", "7")


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from torch.utils.data import Dataset
import normswap
from test_compare import DATA, network


class Slow(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        if not Path("fast").exists():
            Path("training").touch()
            time.sleep(0.02)
        return DATA["data"][0][index], int(DATA["data"][1][index])


if __name__ == "__main__":
    try:
        report = normswap.compare(
            network(), Slow(), DATA["eval_data"], output="out", norms=["bn", "frozen"], batch_sizes=[4], epochs=8,
            images=1, devices=["cpu", "cpu"], lr=0.01,
        )
    except normswap.Interrupted as stop:
        print("interrupted", len(stop.report.results))
        sys.exit(130)
    print([(r.cell.norm, r.score, r.loss) for r in report.results])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="a terminal's Ctrl-C is POSIX's")
def test_ctrl_c_saves_every_training_and_the_same_call_goes_on_from_there(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(normswap.__file__).parents[1])])
    start: Any = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": path}, "text": True, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "script.py"], start_new_session=True, **start)
    try:
        states = [tmp_path / "out" / "cells" / f"{norm}-batch-4" / "state.pt" for norm in ("bn", "frozen")]
        while process.poll() is None and not all(state.exists() for state in states):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.communicate()[0] == "interrupted 0\n"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    steps = [torch.load(state, weights_only=True)["step"] for state in states]
    assert all(0 < step < 32 for step in steps)
    (tmp_path / "fast").touch()
    done = subprocess.run([sys.executable, "script.py"], check=True, **start)
    whole = normswap.compare(
        network(), *DATA.values(), output=tmp_path / "whole", norms=["bn", "frozen"], batch_sizes=[4], epochs=8,
        images=1, lr=0.01,
    )  # fmt: skip
    assert done.stdout == f"{[(r.cell.norm, r.score, r.loss) for r in whole.results]}\n"


def test_rows_of_before_stay_when_fewer_are_asked_for(tmp_path: Path) -> None:
    asked: Any = {**DATA, "output": tmp_path, "images": 16}
    normswap.compare(network(), norms=["bn", "gn"], groups=[1, 2], **asked)
    report = normswap.compare(network(), norms=["gn"], groups=[8], **asked)
    assert [result.cell for result in report.results] == [Cell("gn", 1), Cell("gn", 2), Cell("gn", 8), Cell("bn")]
    assert report.planned == 4
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 5


def test_groups_that_do_not_divide_are_named_with_the_number_taken(tmp_path: Path) -> None:
    report = normswap.compare(network(), **DATA, output=tmp_path, norms=["gn"], groups=[3, 4], images=16)
    assert [result.note for result in report.results] == ["does not divide all channels: 2 in 1 layer", ""]
    assert "does not divide all channels: 2 in 1 layer" in (tmp_path / "table.md").read_text()


def test_the_report_says_how_many_images_its_figures_rest_on(tmp_path: Path) -> None:
    report = normswap.compare(network(), **DATA, output=tmp_path, norms=["bn", "gn"], groups=[1], images=8)
    assert "accuracy on 40 validation images, of which one makes 0.0250; calibrated on 8 training images" in str(report)
