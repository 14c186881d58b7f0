"""Writing files: where to, and that a failed write leaves nothing behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from checked import small, written
from safetensors import SafetensorError

import normswap
from normswap.checkpoint.manifest import is_ours
from normswap.checkpoint.saving import load, save, save_state
from normswap.errors import OutputError
from normswap.files import writing


def refused(path: Path, **kwargs: Any) -> OutputError:
    with pytest.raises(OutputError) as caught:
        save(normswap.convert(small(), "gn", check=False), path, **kwargs)
    return caught.value


def test_an_output_that_cannot_be_written_is_refused_before_anything_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file.safetensors").write_text("mine")
    os.mkfifo(tmp_path / "pipe.safetensors")
    names = sorted(p.name for p in tmp_path.iterdir())
    file, pipe = tmp_path / "file.safetensors", tmp_path / "pipe.safetensors"
    assert refused(tmp_path).message == f"{tmp_path} is a folder"
    assert refused(tmp_path / "no" / "a.safetensors").message == f"the folder {tmp_path / 'no'} does not exist"
    assert refused(file / "a.safetensors").message == f"{file} is not a folder"
    assert refused(pipe).message == f"{pipe} is not a regular file"
    error = refused(file)
    assert error.message == f"{file} exists already"
    assert "overwrite=True" in error.hint
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    assert refused(tmp_path / "a.safetensors").message == f"the folder {tmp_path} is not writable"
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("x.pt", "x.safetensors"),
        ("nets.py", "nets.safetensors"),
        ("v1", "v1.safetensors"),
        ("v1.2", "v1.2.safetensors"),
    ],
)
def test_only_names_of_safetensors_files_are_written(tmp_path: Path, name: str, better: str) -> None:
    (tmp_path / "nets.py").write_text("mine")
    for overwrite in (False, True):
        assert refused(tmp_path / name, overwrite=overwrite).hint == f"Name it {tmp_path / better}."
        with pytest.raises(OutputError, match="not a name for what normswap writes"):
            save_state(small(), tmp_path / name, overwrite=overwrite)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("nets.py", "mine")]


def test_a_name_too_long_for_the_disk_is_one_clear_error(tmp_path: Path) -> None:
    assert "File name too long" in refused(tmp_path / ("x" * 300 + ".safetensors")).message
    assert list(tmp_path.iterdir()) == []
    longest = tmp_path / ("x" * 243 + ".safetensors")
    save(normswap.convert(small(), "gn", check=False), longest)
    assert is_ours(longest)


@pytest.mark.parametrize("name", ["a [bold]b[-] ü 漢.safetensors", "big.SAFETENSORS", ".hidden.safetensors"])
def test_names_with_spaces_markup_and_other_letters_are_written_and_read(tmp_path: Path, name: str) -> None:
    save(normswap.convert(small(), "gn", check=False), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    load(tmp_path / name, model=small())


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def not_serialized(tensors: Any, path: Path, **kwargs: Any) -> Any:
    Path(path).write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "failing", "kind", "said"),
    [
        ("os.replace", no_space, OutputError, "the disk is full"),
        ("os.fsync", no_space, OutputError, "the disk is full"),
        ("tempfile.mkdtemp", no_space, OutputError, "the disk is full"),
        ("safetensors.torch.save_file", no_space, OutputError, "the disk is full"),
        (
            "safetensors.torch.save_file",
            not_serialized,
            OutputError,
            r"a\.safetensors cannot be written: the disk is full$",
        ),
        ("os.replace", interrupted, KeyboardInterrupt, None),
        ("safetensors.torch.save_file", interrupted, KeyboardInterrupt, None),
    ],
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    failing: Any,
    kind: type[BaseException],
    said: str | None,
) -> None:
    converted = normswap.convert(small(), "gn", check=False)
    file = tmp_path / "a.safetensors"
    for old in (None, b"the old file"):
        if old is not None:
            file.write_bytes(old)
        with monkeypatch.context() as patched:
            patched.setattr(place, failing)
            with pytest.raises(kind, match=said):
                save(converted, file, overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["a.safetensors"])
        assert old is None or file.read_bytes() == old
    assert is_ours(save(converted, file, overwrite=True))


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    """A real one: a limit on the size of files makes the kernel refuse."""
    import resource
    import signal

    converted = normswap.convert(small(width=64), "gn", check=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            save(converted, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert written(tmp_path).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_atomic_puts_a_whole_file_in_place_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with writing.atomic(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
        assert temporary.name == "a"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "new")]
