"""Figures for Weights & Biases and MLflow; with the real packages where they are installed, without any network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from finetuned import SMALL, lines, stop_at
from torch import nn

import normswap
from normswap.demo.network import pretrained
from normswap.errors import Interrupted, NormswapError, OptionError
from normswap.finetuning.output.metrics_log import MetricsLog
from normswap.finetuning.output.trackers import Trackers

LOCAL = pytest.mark.filterwarnings("ignore")  # of packages that no test of normswap otherwise runs


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_told_before_anything_is_trained(
    gn: nn.Module, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    told: list[Any] = []
    with pytest.raises(NormswapError, match=f"tracking with {name} needs its package\npip install {name}"):
        normswap.finetune(gn, *data, **SMALL, output=tmp_path / "run", track=name, progress=told.append)  # type: ignore[arg-type]
    assert told == []
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_name_is_no_package(tmp_path: Path, gn: nn.Module, data: Any) -> None:
    if "wandb" in sys.modules:
        pytest.skip("wandb is in use")
    for found in sys.path:
        if (Path(found) / "wandb" / "__init__.py").exists():
            pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()  # as wandb leaves it
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(NormswapError, match="pip install wandb"):
            normswap.finetune(gn, *data, **SMALL, track="wandb")
    finally:
        sys.path.remove(str(tmp_path))


def test_an_unknown_tracker_is_refused(gn: nn.Module, data: Any) -> None:
    with pytest.raises(OptionError, match="track"):
        normswap.finetune(gn, *data, **SMALL, track=["neptune"])  # type: ignore[list-item]


def test_track_tensorboard_is_what_tensorboard_is(gn: nn.Module, data: Any, tmp_path: Path) -> None:
    normswap.finetune(gn, *data, **SMALL, output=tmp_path, track="tensorboard")
    assert list((tmp_path / "tensorboard").glob("events.*"))


class Breaking:
    """A tracker whose server goes away."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log(self, figures: dict[str, float], step: int) -> None:
        if step > 20:
            raise ConnectionError("no route to host")
        self.seen.append((step, figures))

    def finish(self) -> None:
        raise AssertionError("it was given up")


def test_a_tracker_that_breaks_costs_no_training() -> None:
    trackers, broken = Trackers((), None, {}), Breaking()
    trackers._trackers["wandb"] = broken
    log = MetricsLog(None, trackers=trackers)
    for step in (20, 40, 60):
        log.write({"step": step, "epoch": 1.0, "val_loss": 0.5})
    log.close()
    assert broken.seen == [(20, {"epoch": 1.0, "validation/loss": 0.5})]
    assert trackers.failed == ["wandb took no figures from step 40 on: no route to host"]


@LOCAL
@pytest.mark.usefixtures("every_step")
def test_mlflow_has_the_figures_of_the_run_and_of_what_went_on(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    said = {**SMALL, "steps": None, "batch_size": 4, "epochs": 4, "output": tmp_path / "night", "track": "mlflow"}
    with pytest.raises(Interrupted):
        normswap.finetune(normswap.convert(pretrained(), "gn", groups=4), *data, **said, progress=stop_at(22))
    normswap.finetune(normswap.convert(pretrained(), "gn", groups=4), *data, **said, resume=True)
    client = mlflow.MlflowClient()
    (experiment,) = (each for each in client.search_experiments() if each.name == "normswap")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("night", "FINISHED")
    assert run.data.params["batch_size"] == "4"
    for name in ("loss", "val_loss", "val_accuracy", "lr"):
        history = client.get_metric_history(run.info.run_id, name.replace("val_", "validation/"))
        wanted = {line["step"]: line[name] for line in lines(tmp_path / "night") if name in line}
        assert {metric.step: metric.value for metric in history} == wanted


@LOCAL
def test_wandb_has_the_figures_of_the_run(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    model = normswap.convert(pretrained(), "gn", groups=4)
    normswap.finetune(model, *data, batch_size=4, epochs=4, device="cpu", output=tmp_path / "night", track="wandb")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    number = json.loads((tmp_path / "night" / "trackers.json").read_text())["wandb"]
    assert file.name == f"run-{number}.wandb"
    written = file.read_bytes()
    for line in lines(tmp_path / "night"):
        for name in ("loss", "val_loss", "val_accuracy"):
            if name in line:
                assert json.dumps(line[name]).encode() in written
    assert b"validation/loss" in written
