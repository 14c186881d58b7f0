"""What a killed write leaves is removed by the next one to the same name, and by no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from locks import held_elsewhere

import normswap
from normswap.errors import OutputError
from normswap.files.writing import atomic, check_writable, write_safetensors

KILLED = """
import os, signal, sys
from pathlib import Path
import safetensors.torch
from normswap.files.writing import write_safetensors


def killed(tensors, path, metadata=None):
    Path(path).write_bytes(b"half of it")
    (Path(path).parent / ".tmpAbC123").write_bytes(b"safetensors' own")
    os.kill(os.getpid(), signal.SIGKILL)


safetensors.torch.save_file = killed
for _ in range(2):
    process = os.fork()  # a new one with what has been imported
    if not process:
        write_safetensors(Path(sys.argv[1]), {}, {})
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_what_a_killed_write_left_goes_with_the_next_write_to_that_name(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(normswap.__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a.safetensors")]
    subprocess.run(command, env=environment, timeout=120, check=True)
    left = names(tmp_path)
    assert left.count(".tmpAbC123") == 1  # the second write has removed those of the first
    assert "a.safetensors" in left  # half of it, in the hidden folder
    for other in ("b.safetensors", "a", "a.safetensors.b"):
        write_safetensors(tmp_path / other, {"x": torch.zeros(1)}, {})
        (tmp_path / other).unlink()
    assert names(tmp_path) == left
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {})
    assert names(tmp_path) == ["a.safetensors"]


def test_a_write_leaves_what_another_one_is_writing(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "a"):
        (tmp_path / ".a.abcdefgh.part").mkdir()
        with pytest.raises(OutputError, match="is being written by process"), atomic(tmp_path / "a"):
            pass
        assert (tmp_path / ".a.abcdefgh.part").exists()
    with atomic(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["a"]


def test_a_file_in_a_folder_that_is_read_is_kept_and_a_new_one_may_be_written_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"config\.json is read by the same command"):
        check_writable(tmp_path / "config.json", overwrite=True, inputs=[tmp_path])
    check_writable(tmp_path / "new", overwrite=False, inputs=[tmp_path, tmp_path / "missing"])
