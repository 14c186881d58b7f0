"""Folders of results appear on disk whole, or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import Fix, OutputError, Text
from .locking import locked, short
from .writing import PART, SUFFIX, remove_left, told, umask

_OURS = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors|model\.safetensors\.index\.json|\.lock")


@contextmanager
def reserved_folder(path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> Iterator[None]:
    """Within it, the folder `path` can be written, and nobody else writes it. Raises OutputError.

    inputs: files and folders that the result is made from and must not replace. overwrite: a folder that holds shards
    and nothing else may be replaced; an empty one always.
    """
    kept = list(inputs)
    _check(path, overwrite, kept)
    with locked(path):
        _check(path, overwrite, kept)  # somebody may have written it before the lock was ours
        yield


def _check(path: Path, overwrite: bool, inputs: list[Path]) -> None:
    with told(path):
        check_folder_name(path)
        _check_place(path, overwrite, inputs)


def check_folder_name(path: Path) -> None:
    """Raise OutputError for a name that is one of a file."""
    if path.suffix.lower() == SUFFIX:
        better = path.with_suffix("")
        raise OutputError(f"{path} is the name of a file, and shards go into a folder", hint=f"Name it {better}.")


def _check_place(path: Path, overwrite: bool, inputs: list[Path]) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"the folder {path.parent} is not writable")
    if not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink():
        raise OutputError(f"{path} is not a folder", hint="Name another place for the shards.")
    within = path.resolve()  # of a link in it, as in Hugging Face's cache, the file may lie elsewhere
    if any(place.is_relative_to(within) for f in inputs for place in (f.resolve(), f.parent.resolve() / f.name)):
        raise OutputError(
            f"{path} is read by the same command, which never writes over what it reads", hint="-o names another place."
        )
    _check_replaceable(path)
    if set(os.listdir(path)) - {".lock"} and not overwrite:
        raise OutputError(f"{path} exists already", hint=Text(Fix("overwrite", True), " replaces it."))


def _check_replaceable(path: Path) -> None:
    """Raise OutputError for a folder that no other can be put in the place of, or that holds anything but shards."""
    if path.resolve() == Path.cwd() or os.path.ismount(path):
        what = "a mount point" if os.path.ismount(path) else "the current folder"
        raise OutputError(
            f"{path} is {what}, which cannot be replaced as a whole", hint=f"Name a folder in it: {path / 'shards'}"
        )
    if others := sorted(name for name in os.listdir(path) if not _OURS.fullmatch(name)):
        raise OutputError(
            f"{path} holds {others[0]}, and only a folder of shards alone is replaced", hint="Name another folder."
        )


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write into a hidden folder beside `path`, which takes its place only when all went well.

    What killed writes to this name have left is removed. Raises OutputError when the disk is full or a file cannot be
    written. Ctrl-C leaves nothing behind either.
    """
    with told(path), locked(path):
        hidden: Path | None = None
        try:
            remove_left(path)
            hidden = Path(tempfile.mkdtemp(prefix=f".{short(path.name)}.", suffix=PART, dir=path.parent))
            temporary = hidden / "new"
            temporary.mkdir()
            yield temporary
            for entry in list(os.scandir(temporary)):
                os.chmod(entry.path, 0o666 & ~umask())
                with open(entry.path, "rb+") as file:
                    os.fsync(file.fileno())
            if path.is_dir():
                _check_replaceable(path)  # somebody may have put something into it since
                os.replace(path, hidden / "old")
            os.replace(temporary, path)
        except BaseException:
            if hidden is not None and (hidden / "old").is_dir() and not path.exists():
                os.replace(hidden / "old", path)
            raise
        finally:
            if hidden is not None:
                shutil.rmtree(hidden, ignore_errors=True)
