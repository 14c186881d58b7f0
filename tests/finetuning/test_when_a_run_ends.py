"""Early stopping, the figure that is monitored, and states between two epochs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuned import changed, lines, settings, stop_at, tensors
from torch import nn

import normswap
from normswap.demo.network import pretrained
from normswap.errors import Interrupted, OptionError
from normswap.finetuning.engine.checkpointer import RunState
from normswap.finetuning.engine.monitor import Monitor
from normswap.finetuning.settings import Every

IDLE = {"batch_size": 4, "lr": 1e-12, "device": "cpu"}
"""Ten steps an epoch that change next to nothing."""


def fresh() -> nn.Module:
    return normswap.convert(pretrained(), "gn", groups=4)


@pytest.mark.parametrize(
    ("monitor", "values", "best_at", "end"),
    [
        (None, [0.5, 0.6, 0.6, 0.4, 0.5], 1, 4),
        (None, [0.5, 0.4, 0.3, 0.6, 0.5], 3, None),
        ("loss", [0.5, 0.4, 0.6, 0.4, 0.5], 1, 4),
        ("loss", [0.5, 0.4, 0.3, 0.6, 0.5], 2, None),
        ("loss", [math.nan, 0.4, math.nan, 0.4, 0.4], 1, 4),
    ],
)
def test_patience_counts_from_the_last_better_figure(
    monitor: str | None, values: list[float], best_at: int, end: int | None
) -> None:
    judge = Monitor(settings(steps=9, lr=1.0, warmup=0.0, patience=3, monitor=monitor), "val_accuracy")
    standing, ends = RunState(), []
    for step, value in enumerate(values):
        judge.judge(standing, step, {judge.name: value})
        ends += [step] if judge.exhausted(standing) else []
    assert standing.best_at == best_at
    assert ends[:1] == ([] if end is None else [end])


def test_a_run_ends_where_nothing_gets_better_and_says_so(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    report = normswap.finetune(gn, *data, **IDLE, epochs=9, patience=2, output=tmp_path / "run")
    assert (report.steps, report.planned, report.interrupted) == (20, 90, False)
    assert "ended after 20 of 90 steps: 2 validations without a better accuracy" in report.notes
    assert [line["step"] for line in lines(tmp_path / "run") if "val_loss" in line] == [0, 10, 20]
    again = normswap.finetune(gn, *data, **IDLE, epochs=9, patience=2, output=tmp_path / "run", resume=True)
    assert (again.steps, again.resumed_at, again.interrupted) == (20, 20, False)


@pytest.mark.usefixtures("every_step")
def test_a_stopped_run_goes_on_counting(data: Any, tmp_path: Path) -> None:
    said = {**IDLE, "epochs": 9, "patience": 3, "ema": 0.9, "lr": 1e-9}
    whole, cut = fresh(), fresh()
    assert normswap.finetune(whole, *data, **said, output=tmp_path / "whole").steps == 30
    for step in (13, 22):
        with pytest.raises(Interrupted):
            normswap.finetune(cut, *data, **said, output=tmp_path / "cut", progress=stop_at(step), resume=step > 13)
        cut = fresh()
    assert normswap.finetune(cut, *data, **said, output=tmp_path / "cut", resume=True).steps == 30
    assert not changed(cut, tensors(whole))


def test_the_best_network_is_that_of_the_figure_monitored(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    said = {"batch_size": 4, "epochs": 4, "lr": 0.01, "device": "cpu"}
    report = normswap.finetune(gn, *data, **said, monitor="loss", output=tmp_path / "run")
    losses = {line["step"]: line["val_loss"] for line in lines(tmp_path / "run") if "val_loss" in line}
    assert report.best_name == "val_loss"
    assert report.best == pytest.approx(min(losses.values()), rel=1e-5)
    assert report.best_at == min(losses, key=losses.__getitem__)
    best, (x, y) = normswap.load(report.best_file, model=pretrained()), data[1]
    with torch.no_grad():
        assert float(nn.functional.cross_entropy(best(x), y)) == pytest.approx(report.best, rel=1e-5)
    with pytest.raises(OptionError, match="monitor"):
        normswap.finetune(fresh(), *data, **said, output=tmp_path / "run", resume=True)
    normswap.finetune(fresh(), *data, **said, output=tmp_path / "usual")
    normswap.finetune(fresh(), *data, **said, output=tmp_path / "usual", resume=True, monitor="val_accuracy")


def test_what_cannot_be_monitored_is_refused_before_anything_is_replaced(gn: nn.Module, data: Any) -> None:
    for said, words in (
        ({"patience": 2}, "patience needs validation images"),
        ({"monitor": "loss"}, "monitor needs validation images"),
        ({"monitor": "miou"}, "monitor"),
        ({"patience": 0}, "patience"),
        ({"checkpoint_every": "often"}, "500 steps or 10 minutes"),
    ):
        with pytest.raises(OptionError, match=words):
            normswap.finetune(gn, data[0], steps=1, device="cpu", **said)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "steps", "seconds"),
    [
        ("500 steps", 500, None), ("1 step", 1, None), (7, 7, None), ("12", 12, None), (None, None, None),
        ("10 minutes", None, 600.0), ("1 Minute", None, 60.0), ("1.5 hours", None, 5400.0), ("2h", None, 7200.0),
    ],
)  # fmt: skip
def test_how_often_is_said_in_steps_or_time(said: Any, steps: int | None, seconds: float | None) -> None:
    assert Every.of(said) == Every(steps, seconds)


@pytest.mark.parametrize("said", ["0 steps", "1.5 steps", "-3 steps", "ten steps", "5 days", "", 0])
def test_how_often_must_make_sense(said: Any) -> None:
    with pytest.raises(OptionError, match="checkpoint_every"):
        Every.of(said)


def test_the_state_of_a_version_without_these_options_goes_on(data: Any, tmp_path: Path) -> None:
    said = {**IDLE, "epochs": 1, "output": tmp_path}
    normswap.finetune(fresh(), *data, **said)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for name in ("patience", "monitor", "mixup", "cutmix", "rand_augment"):
        del state["settings"][name]
    del state["standing"]["waited"]
    torch.save(state, tmp_path / "state.pt")
    assert normswap.finetune(fresh(), *data, **said, resume=True).resumed_at == 10


class Crash(Exception):
    pass


@pytest.mark.parametrize(("every", "kept"), [("3 steps", {6}), ("0.0000001 minutes", {7, 8})])
@pytest.mark.usefixtures("every_step")
def test_a_crash_within_an_epoch_costs_the_steps_since_the_last_checkpoint(
    data: Any, tmp_path: Path, every: str, kept: set[int]
) -> None:
    def crash(progress: Any) -> None:
        if progress.step == 8:
            raise Crash

    said = {"batch_size": 4, "epochs": 2, "lr": 1e-3, "device": "cpu", "output": tmp_path / "run"}
    whole, cut = fresh(), fresh()
    normswap.finetune(whole, *data, **(said | {"output": None}))
    with pytest.raises(Crash):
        normswap.finetune(cut, *data, **said, checkpoint_every=every, progress=crash)
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] in kept
    cut = fresh()
    report = normswap.finetune(cut, *data, **said, resume=True)
    assert report.resumed_at in kept
    assert not changed(cut, tensors(whole))


def told(folder: Path) -> list[dict[str, float]]:
    """The lines of the log, without how fast it went."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in lines]


@pytest.mark.usefixtures("every_step")
def test_a_checkpoint_within_an_epoch_changes_no_figure_not_even_of_a_run_that_goes_on_from_it(
    data: Any, tmp_path: Path
) -> None:
    def crash(progress: Any) -> None:
        if progress.step == 8:
            raise Crash

    said = {"batch_size": 4, "epochs": 2, "lr": 1e-3, "device": "cpu"}
    found = {}
    for every in (None, 3):
        found[every] = normswap.finetune(fresh(), *data, **said, output=tmp_path / str(every), checkpoint_every=every)
    with pytest.raises(Crash):
        normswap.finetune(fresh(), *data, **said, output=tmp_path / "cut", checkpoint_every=3, progress=crash)
    found["cut"] = normswap.finetune(fresh(), *data, **said, output=tmp_path / "cut", resume=True)
    assert found["cut"].resumed_at == 6
    for name in (3, "cut"):
        assert found[name].window == found[None].window
        for line, expected in zip(told(tmp_path / str(name)), told(tmp_path / "None"), strict=True):
            assert line == pytest.approx(expected, rel=1e-9)
