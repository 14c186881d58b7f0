"""Results appear on disk whole, or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Fix, OutputError, Text
from .locking import locked, short

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
PART = ".part"
_FULL = "the disk is full"


@contextmanager
def reserved(path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> Iterator[None]:
    """Within it, the safetensors file `path` can be written, and nobody else writes it. Raises OutputError.

    inputs: files, and folders of files, that the result is made from and must not replace, whatever `overwrite` says.
    """
    check_name(path)
    kept = list(inputs)
    check_writable(path, overwrite=overwrite, inputs=kept)
    with locked(path):
        check_writable(path, overwrite=overwrite, inputs=kept)  # somebody may have written it before the lock was ours
        yield


def check_name(path: Path) -> None:
    """Raise OutputError for a name that is not one of a safetensors file: of source code, of a pickle."""
    if path.suffix.lower() == SUFFIX or path.is_dir():  # a folder is told as one
        return
    better = path.with_suffix(SUFFIX) if path.suffix[1:].isalpha() else path.with_name(path.name + SUFFIX)
    raise OutputError(
        f"{path} is not a name for what normswap writes, which is a safetensors file", hint=f"Name it {better}."
    )


def check_writable(path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise OutputError, before any work is done, when a result cannot go to `path`."""
    try:
        check_kept(path, inputs)
        _check_place(path, overwrite)
    except OSError as error:  # a name too long, a folder nobody may look into
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def check_kept(path: Path, inputs: Iterable[Path]) -> None:
    """Raise OutputError where writing `path` would replace one of the `inputs`, by whatever name, or a file in one."""
    if not path.exists():
        return
    for file in inputs:
        if file.exists() and (path.samefile(file) or (file.is_dir() and path.resolve().is_relative_to(file.resolve()))):
            raise OutputError(
                f"{path} is read by the same command, which never writes over what it reads",
                hint="-o names another place.",
            )


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
            save_file(apart(tensors), temporary, metadata=metadata)
    except SafetensorError as error:
        raise OutputError(f"{path} cannot be written: {full_disk(str(error)) or error}") from error


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous on the CPU, and no two in the same memory, which safetensors does not take."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu()
        storage = here.untyped_storage().data_ptr() if here.numel() else 0
        found[name] = here.clone() if storage and storage in storages else here.contiguous()
        storages.add(storage)
    return found


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to a file of the same name in a hidden folder; it takes the place of `path` only when all went well.

    The folder lies beside `path`, and holds what libraries write for themselves too, such as safetensors' `.tmp` files.
    Those of writes to this name that were killed are removed: whoever holds the lock knows that nobody is writing them.
    Raises OutputError when the disk is full or the file cannot be written. Ctrl-C leaves nothing behind either.
    """
    with told(path), locked(path):
        folder: Path | None = None
        try:
            remove_left(path)
            folder = Path(tempfile.mkdtemp(prefix=f".{short(path.name)}.", suffix=PART, dir=path.parent))
            temporary = folder / path.name
            temporary.touch()
            yield temporary
            os.chmod(temporary, 0o666 & ~umask())
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def remove_left(path: Path) -> None:
    """Remove what killed writes to `path` have left."""
    name = re.compile(re.escape(f".{short(path.name)}.") + r"\w{8}" + re.escape(PART))
    for entry in list(os.scandir(path.parent)):
        if name.fullmatch(entry.name):
            shutil.rmtree(entry.path, ignore_errors=True)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Raise OutputError for what the file system refuses."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(f"{path} cannot be written: {_FULL if full else error.strerror or error}") from error


def full_disk(text: str) -> str | None:
    """What a library that writes by itself means by an error's number, or by its text."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return _FULL if any(f"(os error {code})" in text or os.strerror(code) in text for code in codes) else None


def umask() -> int:
    """The process's file mode creation mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
