"""The folder of a run: nothing stays of one that comes to nothing, nothing goes that was there before."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from normswap.errors import OutputError
from normswap.finetuning.output.layout import BOARD, METRICS, STATE, run_folder
from normswap.training.run_state import save_state


def fail(folder: Path, *names: str) -> None:
    """A run that writes these files and then fails."""

    def work() -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("new")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), run_folder(folder, resume=False, force=True):
        work()


def test_a_run_that_fails_before_its_first_state_leaves_nothing(tmp_path: Path) -> None:
    fail(tmp_path / "runs" / "a", METRICS, "run.json", "best.safetensors", f"{BOARD}/events.out.tfevents.1")
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    for name in ("best.safetensors", METRICS, "notes.txt"):
        (tmp_path / name).write_text("old")
    fail(tmp_path, "run.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.safetensors", METRICS, "notes.txt"]


def test_a_run_with_a_state_stays_whole(tmp_path: Path) -> None:
    fail(tmp_path, METRICS, STATE)
    assert sorted(p.name for p in tmp_path.iterdir()) == [METRICS, STATE]


def test_what_a_killed_run_left_half_written_goes(tmp_path: Path) -> None:
    (tmp_path / ".state.pt.abcdefgh.part").mkdir()
    (tmp_path / ".state.pt.abcdefgh.part" / STATE).write_text("half")
    with run_folder(tmp_path, resume=False, force=False):
        assert not list(tmp_path.glob("*.part"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_although_torch_does_not_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unclear(*args: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", unclear)
    with pytest.raises(OutputError, match=r"cannot be written: \[enforce fail"):
        save_state(tmp_path / STATE, {}, {})
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"state\.pt cannot be written: the disk is full$"):
        save_state(tmp_path / STATE, {}, {})
    assert list(tmp_path.iterdir()) == []
