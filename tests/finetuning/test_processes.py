"""Fine-tuning as users start it: killed in the middle, and by two processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import test_detection_task
import test_segmentation_task
import torch
from detectors import shapes_folder
from test_datasets import paint

import normswap
from normswap.cli import app

CLASSIFIER = """
import os, signal
from pathlib import Path
import safetensors.torch
import torch
from torch import nn

def tiny():
    if os.environ.get("KILLED"):
        safetensors.torch.save_file = half
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0), nn.Linear(8, 3))

save = safetensors.torch.save_file

def half(tensors, path, metadata=None):
    if Path("cut", "metrics.jsonl").read_text().count("val_loss") > 2:  # at the end of the second epoch
        Path(path).write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    save(tensors, path, metadata)
"""
SEVERAL = """
import multiprocessing, os, sys, uuid
import matplotlib.backends.backend_agg, pycocotools.coco, torchmetrics.detection, torchvision
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from normswap.cli import app
from normswap.finetuning import finetune

def alone(line):
    os.environ["KILLED"] = "1"
    app(line.split(), prog_name="normswap", standalone_mode=False)

def together(lines, *ports):
    for port, line in zip(["", *ports], lines):
        if port:  # a second meeting of the same processes needs a place of its own
            os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
        app(line.split(), prog_name="normswap", standalone_mode=False)

killed, *lines = open("commands").read().splitlines()
process = multiprocessing.get_context("fork").Process(target=alone, args=[killed])
process.start()
process.join()
open("killed", "w").write(str(process.exitcode))
meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(uuid.uuid4())}  # torchrun --standalone
elastic_launch(LaunchConfig(1, 1, nproc_per_node=2, start_method="fork", **meeting), together)(lines, *sys.argv[1:])
"""
"""What torchrun does, but that the libraries, which take seconds, are imported once for all processes, not by each."""


SETTINGS = ("--batch-size", "2", "--epochs", "4", "--ema")  # of the run that is killed


def environment() -> dict[str, str]:
    """One thread each; not as a part of another group of processes."""
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return own | {"OMP_NUM_THREADS": "1"}


def classifying(output: str, *more: str) -> list[str]:
    fixed = ["--weights", "none", "--to", "gn", "--groups", "4", "--data", "photos", "--lr", "0.01", "--trust-code"]
    return ["finetune", "nets.py:tiny", *fixed, "--device", "cpu", "--output", output, "--json", *more]


def detecting(output: str, *more: str) -> list[str]:
    fixed = ["--weights", "none", "--trust-code", "--data", "shapes", "--task", "detection", "--device", "cpu"]
    return ["finetune", "boxes.py:grouped", *fixed, "--steps", "2", "--output", output, "--quiet", *more]


def segmenting(output: str, *more: str) -> list[str]:
    fixed = ["--weights", "none", "--trust-code", "--data", "shapes", "--task", "segmentation", "--augment", "none"]
    return ["finetune", "masks.py:pixels", *fixed, "--steps", "4", "--output", output, "--quiet", *more]


def fill(folder: Path) -> None:
    (folder / "nets.py").write_text(CLASSIFIER)
    (folder / "boxes.py").write_text(test_detection_task.NETS)
    (folder / "masks.py").write_text(test_segmentation_task.NETS)
    paint(folder / "photos" / "train", 4)
    paint(folder / "photos" / "val", 3)


def free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("localhost", 0))) for _ in range(count)]
        return [str(each.getsockname()[1]) for each in sockets]


def weights(folder: str) -> dict[str, torch.Tensor]:
    return normswap.load(f"{folder}/last.safetensors", trust_code=True).state_dict()


def figures(folder: str | Path) -> list[dict[str, float]]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "samples_per_second"} for line in lines]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The command in this process, and what it reports."""
    app(arguments, prog_name="normswap", standalone_mode=False)
    printed = capsys.readouterr().out
    return json.loads(printed) if printed else None


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was killed, and one of each task by two processes, all started at once."""
    folder = tmp_path_factory.mktemp("together")
    fill(folder)
    shapes_folder(folder / "shapes", 64)
    commands = [
        classifying("cut", *SETTINGS),
        classifying("classes", "--batch-size", "2", "--epochs", "2"),
        detecting("boxes", "--batch-size", "1"),
        segmenting("masks", "--batch-size", "1"),
    ]
    (folder / "several.py").write_text(SEVERAL)
    (folder / "commands").write_text("\n".join(map(" ".join, commands)))
    ran = subprocess.run(
        [sys.executable, "several.py", *free_ports(2)],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    (folder / "report.json").write_text(ran.stdout)
    return folder


def test_a_run_that_is_killed_while_it_writes_goes_on_bit_for_bit(
    together: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(together)
    assert Path("killed").read_text() == str(-signal.SIGKILL)
    assert list(Path("cut").glob(".*.part"))
    report = run(capsys, *classifying("cut", *SETTINGS), "--resume")
    assert (report["resumed_at"], report["steps"]) == (6, 24)
    assert not list(Path("cut").glob(".*.part"))
    run(capsys, *classifying("whole", *SETTINGS))
    first, second = weights("cut"), weights("whole")
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert figures("cut") == figures("whole")


def test_two_processes_do_the_steps_of_one(
    together: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(together)
    alone = run(capsys, *classifying("classes-alone", "--batch-size", "4", "--epochs", "2"))
    first, second = weights("classes"), weights("classes-alone")
    assert max(float((first[n] - second[n]).abs().max()) for n in second) < 1e-4
    report = json.loads(Path("report.json").read_text())
    assert [r["processes"] for r in (report, alone)] == [2, 1]
    assert [r["global_batch"] for r in (report, alone)] == [4, 4]
    for name, value in alone["figures"].items():  # 9 validation images, 5 and 4 a process: each counted once
        assert report["figures"][name] == pytest.approx(value, abs=1e-4)


def test_two_processes_find_the_map_of_one(
    together: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three validation images, so one process has two of them and the other one."""
    monkeypatch.chdir(together)
    run(capsys, *detecting("boxes-alone", "--batch-size", "2"))
    one, two = figures("boxes-alone"), figures("boxes")
    assert one[0] == pytest.approx(two[0], rel=1e-4, abs=1e-5)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=0.2)  # proposals are drawn by each process for itself
    assert {p.name for p in Path("boxes").iterdir()} >= {"best.safetensors", "curves.png", "examples.png"}


def test_two_processes_learn_segmentation_as_one_does(
    together: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three validation images again. --device auto: there may be no GPU."""
    monkeypatch.chdir(together)
    run(capsys, *segmenting("masks-alone", "--batch-size", "2"))
    one, two = figures("masks-alone"), figures("masks")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4)
