"""Fine-tuning as users start it: killed in the middle, and by two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import normswap

NETS = """
import torch
from torch import nn

def tiny():
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0), nn.Linear(8, 3))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from test_datasets import paint

    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    paint(tmp_path / "photos" / "train", 8)
    paint(tmp_path / "photos" / "val", 3)
    return tmp_path


def command(output: str, *more: str) -> list[str]:
    fixed = ["nets.py:tiny", "--weights", "none", "--to", "gn", "--groups", "4", "--data", "photos", "--lr", "0.01"]
    return ["finetune", *fixed, "--device", "cpu", "--trust-code", "--output", output, "--json", *more]


def environment() -> dict[str, str]:
    """One thread each; not as a part of another group of processes."""
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return own | {"OMP_NUM_THREADS": "1"}


def run(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [sys.executable, *(launcher if processes > 1 else []), "-m", "normswap", *arguments]
    return subprocess.run(start, capture_output=True, text=True, env=environment(), timeout=240)


def weights(folder: str) -> dict[str, torch.Tensor]:
    return normswap.load(f"{folder}/last.safetensors", trust_code=True).state_dict()


def figures(folder: str) -> list[dict[str, float]]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "samples_per_second"} for line in lines]


def test_a_killed_run_goes_on_bit_for_bit(place: Path) -> None:
    settings = ["--batch-size", "2", "--epochs", "25", "--ema"]
    process = subprocess.Popen(
        [sys.executable, "-m", "normswap", *command("cut", *settings)],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = place / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) > 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = len(metrics.read_text().splitlines())
    assert reached > 6
    resumed = run(*command("cut", *settings, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    report = json.loads(resumed.stdout)
    assert 0 < report["resumed_at"] < report["steps"] == 300
    assert not list((place / "cut").glob(".*.part"))
    assert run(*command("whole", *settings)).returncode == 0
    first, second = weights("cut"), weights("whole")
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert figures("cut") == figures("whole")


def test_two_processes_do_the_steps_of_one(place: Path) -> None:
    together = run(*command("two", "--batch-size", "2", "--epochs", "2"), processes=2)
    assert together.returncode == 0, together.stderr
    alone = run(*command("one", "--batch-size", "4", "--epochs", "2"))
    assert alone.returncode == 0, alone.stderr
    first, second = weights("two"), weights("one")
    assert max(float((first[n] - second[n]).abs().max()) for n in second) < 1e-4
    reports = [json.loads(ran.stdout) for ran in (together, alone)]
    assert [r["processes"] for r in reports] == [2, 1]
    assert [r["global_batch"] for r in reports] == [4, 4]
    for name, value in reports[1]["figures"].items():  # 9 validation images, 5 and 4 a process: each counted once
        assert reports[0]["figures"][name] == pytest.approx(value, abs=1e-4)
