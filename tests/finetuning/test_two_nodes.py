"""Fine-tuning on two nodes: two launchers with a process each, which meet over loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from shutil import copytree

import pytest
import torch
from test_processes import classifying, environment, figures, fill, free_ports

import normswap

pytestmark = pytest.mark.slow
LONG = ("--batch-size", "2", "--epochs", "20")


class Nodes:
    """Launchers that were started, each in a session of its own; `ended` waits for what they and theirs print."""

    def __init__(self) -> None:
        self.launchers: list[subprocess.Popen[bytes]] = []

    def start(self, folders: Sequence[Path], command: Sequence[str]) -> list[subprocess.Popen[bytes]]:
        (port,) = free_ports(1)
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(folders)}", *meeting]
        launcher += [f"--nproc-per-node={2 // len(folders)}", "-m", "normswap"]
        self.launchers = []
        for i, folder in enumerate(folders):
            with (folder / f"errors{i}").open("w") as errors:
                self.launchers.append(
                    subprocess.Popen(
                        [*launcher, *command], cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=errors
                    )
                )
        return self.launchers

    def ended(self, folders: Sequence[Path]) -> list[tuple[int, str]]:
        """Exit code and standard error of each."""
        codes = [launcher.wait(timeout=100) for launcher in self.launchers]
        return [
            (code, (folder / f"errors{i}").read_text())
            for i, (code, folder) in enumerate(zip(codes, folders, strict=True))
        ]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    started = Nodes()
    yield started
    for launcher in started.launchers:
        if launcher.poll() is None:
            launcher.terminate()  # it ends its workers
            launcher.wait(timeout=60)


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that one launcher started."""
    folder = tmp_path_factory.mktemp("one_node")
    fill(folder)
    launched = Nodes()
    launched.start([folder], classifying("run", *LONG))
    ((code, errors),) = launched.ended([folder])
    assert code == 0, errors
    return folder


def folders_of(tmp_path: Path, *, shared: bool) -> list[Path]:
    found = [tmp_path] * 2 if shared else [tmp_path / "a", tmp_path / "b"]
    for folder in dict.fromkeys(found):
        folder.mkdir(exist_ok=True)
        fill(folder)
    return found


def first_of(folders: Sequence[Path]) -> tuple[Path, Path]:
    """The folder of the node with the first process, which the nodes settle among themselves, and the other."""
    first = next(folder for folder in folders if (folder / "run").exists())
    return first, next(folder for folder in folders if folder != first)


def same_run(one: Path, other: Path) -> None:
    there, here = (normswap.load(f / "run" / "last.safetensors", trust_code=True).state_dict() for f in (one, other))
    for name, value in there.items():
        torch.testing.assert_close(here[name], value, rtol=1e-5, atol=1e-6)
    assert [line["step"] for line in figures(one / "run")] == [line["step"] for line in figures(other / "run")]


def test_two_nodes_without_a_shared_folder_do_what_two_processes_of_one_do(
    one_node: Path, nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only the first process writes; going on then needs the folder on both, and says so on both."""
    folders = folders_of(tmp_path, shared=False)
    nodes.start(folders, classifying("run", *LONG))
    ends = nodes.ended(folders)
    assert [code for code, _ in ends] == [0, 0], ends
    first, second = first_of(folders)
    monkeypatch.chdir(first)
    same_run(one_node, first)
    assert not (second / "run").exists()
    before = (first / "run" / "state.pt").read_bytes()
    nodes.start(folders, classifying("run", *LONG, "--resume"))
    for code, errors in nodes.ended(folders):
        assert code != 0
        assert "run/last.safetensors" in errors or "run/state.pt" in errors
        assert "has stopped" in errors or "there is no" in errors
        assert "RuntimeError" not in errors
    assert (first / "run" / "state.pt").read_bytes() == before
    copytree(first / "run", second / "run")
    state = torch.load(second / "run" / "state.pt", weights_only=True)
    torch.save({**state, "step": 3}, second / "run" / "state.pt")
    nodes.start(folders, classifying("run", *LONG, "--resume"))
    for code, errors in nodes.ended(folders):
        assert code != 0
        assert "the processes have states of different steps" in errors


def test_nodes_with_different_images_are_told(nodes: Nodes, tmp_path: Path) -> None:
    folders = folders_of(tmp_path, shared=False)
    next((folders[1] / "photos" / "val").rglob("*.png")).unlink()
    nodes.start(folders, classifying("run", *LONG))
    for code, errors in nodes.ended(folders):
        assert code != 0
        assert "error: the processes differ in" in errors
        assert "the same files" in errors


def test_a_signal_to_one_node_stops_both_and_the_run_goes_on(
    one_node: Path, nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = folders_of(tmp_path, shared=True)
    monkeypatch.chdir(tmp_path)
    launchers = nodes.start(folders, classifying("run", *LONG))
    lines, limit = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not lines.is_file() or len(lines.read_text().splitlines()) < 3:
        assert time.monotonic() < limit
        time.sleep(0.05)
    os.kill(launchers[1].pid, signal.SIGTERM)
    ends = nodes.ended(folders)
    assert all(code != 0 for code, _ in ends)
    told = "".join(errors for _, errors in ends)
    assert told.count("state.pt is complete, and the same command with --resume goes on from there") == 1, told
    assert not list((tmp_path / "run").glob(".*.part"))
    assert len(figures("run")) < len(figures(one_node / "run"))
    nodes.start(folders, classifying("run", *LONG, "--resume"))
    ends = nodes.ended(folders)
    assert [code for code, _ in ends] == [0, 0], ends
    same_run(one_node, tmp_path)


def test_what_one_node_refuses_ends_the_other_and_is_told_there(nodes: Nodes, tmp_path: Path) -> None:
    folders = folders_of(tmp_path, shared=False)
    for folder in folders:
        (folder / "run").mkdir()
        (folder / "run" / "state.pt").write_bytes(b"of before")
    nodes.start(folders, classifying("run", *LONG))
    ends = nodes.ended(folders)
    assert all(code != 0 for code, _ in ends)
    told = [errors for _, errors in ends]
    assert sum("error: run holds a run already" in errors for errors in told) == 1, told
    assert sum("has stopped: run holds a run already" in errors for errors in told) == 1, told
    assert all("--resume goes on with it" in errors for errors in told)
