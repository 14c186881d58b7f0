"""Two writers of one file or folder: the second is told who the first is; a dead one is in nobody's way."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from locks import held_elsewhere

from normswap.errors import OutputError
from normswap.files import locking
from normswap.files.locking import locked


@pytest.mark.parametrize("folder", [False, True])
def test_the_second_is_told_which_process_holds_the_place(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "out"
    if folder:
        path.mkdir()
    with held_elsewhere(path) as process:
        with pytest.raises(OutputError) as caught, locked(path):
            pass
        found = rf"{path} is being written by process {process.pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d: -c "
        assert caught.match(found)
        process.communicate()
    with locked(path):
        pass
    assert [p.name for p in tmp_path.rglob("*") if p != path] == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_killed_holder_is_in_nobodys_way(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "out") as process:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert locking.lock_file(tmp_path / "out").exists()
        with locked(tmp_path / "out"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_thread_may_take_its_lock_again_and_another_thread_may_not(tmp_path: Path) -> None:
    said: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path / "out"):
                said.append("held")
        except OutputError as error:
            said.append(error.message)

    def ask() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(60)

    with locked(tmp_path / "out"):
        with locked(tmp_path / "out"):
            pass
        ask()
        with locked(tmp_path / "other"):
            pass
    ask()
    assert said == [f"{tmp_path / 'out'} is being written by another thread of this process", "held"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_neither_holds_the_lock_nor_ends_it(tmp_path: Path) -> None:
    def holds(path: Path) -> bool:
        child = os.fork()
        if child == 0:
            try:
                with locked(path):
                    os._exit(1)
            finally:
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    with locked(tmp_path / "out"):
        assert holds(tmp_path / "out")
        assert holds(tmp_path / "out")
    assert not holds(tmp_path / "out")


def test_a_lock_that_its_last_holder_removed_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, lock, calls = locking.lock_file(tmp_path / "out"), locking._lock, []

    def removed(handle: int) -> bool:
        calls.append(handle)
        if len(calls) == 1:
            file.unlink()
        return lock(handle)

    monkeypatch.setattr(locking, "_lock", removed)
    with locked(tmp_path / "out"):
        assert len(calls) == 2
        assert file.exists()


def test_names_that_begin_alike_have_locks_of_their_own(tmp_path: Path) -> None:
    names = ["a", "a.safetensors", "x" * 240 + ".safetensors", "x" * 241 + ".safetensors", "漢" * 80, "漢" * 81]
    assert len({locking.lock_file(tmp_path / name) for name in names}) == len(names)
    for name in names:
        with locked(tmp_path / name):
            pass
