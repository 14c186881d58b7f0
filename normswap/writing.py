"""Results appear on disk whole, or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import Fix, OutputError, Text

if TYPE_CHECKING:
    from torch import Tensor


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError, before any work is done, when a result cannot go to `path`."""
    try:
        _check_place(path, overwrite)
    except OSError as error:  # a name too long, a folder nobody may look into
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _check_place(path: Path, overwrite: bool) -> None:
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder", hint=f"Give a file name, such as {path / 'model.safetensors'}.")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a regular file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already", hint=Text(Fix("overwrite", True), " replaces it."))
    if not folder.is_dir():
        raise OutputError(f"the folder {folder} does not exist" if not folder.exists() else f"{folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {folder} is not writable")


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors, from any device, to `path`. Raises OutputError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with atomic(path) as temporary:
            save_file({k: t.detach().cpu() for k, t in tensors.items()}, temporary, metadata=metadata)
    except SafetensorError as error:
        raise OutputError(f"{path} cannot be written: {error}", hint="Is the disk full?") from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to a temporary name beside `path`; it takes the place of `path` only when all went well.

    Raises OutputError when the disk is full or the file cannot be written. Ctrl-C leaves nothing behind either.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        raise OutputError(
            f"{path} cannot be written: {'the disk is full' if full else error.strerror or error}"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
