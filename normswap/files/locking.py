"""One writer at a time: a lock on a file or folder that the death of its holder releases."""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from ..errors import OutputError

_NAME = 100  # bytes of a file's name that go into the lock's, which may not be longer than 255
_TRIES = 100
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_GUARD = threading.Lock()
_HELD: dict[tuple[int, Path], tuple[int, int]] = {}
"""Who holds what here: by process, since a forked child takes nothing over, and file, the thread and how often."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only one to write the file or folder `path`; the thread that holds the lock may take it again.

    The operating system keeps it, on a hidden file beside `path` (within it, if it is a folder), and releases it when
    its holder ends, in whatever way. Raises OutputError, which names the holder, or says why there can be no lock.
    """
    file = lock_file(path)
    key, me = (os.getpid(), file), threading.get_ident()
    with _GUARD:
        thread, times = _HELD.get(key, (me, 0))
        if thread != me:
            raise _busy(path, "another thread of this process")
        _HELD[key] = me, times + 1
    handle: int | None = None
    try:
        try:
            handle = None if times else _taken(file, path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
        yield
    finally:
        if handle is not None:
            _release(handle, file)
        with _GUARD:
            if times:
                _HELD[key] = me, times
            else:
                del _HELD[key]


def lock_file(path: Path) -> Path:
    """Where the lock of a file or folder lies."""
    if path.is_dir():
        return path.resolve() / ".lock"
    return path.parent.resolve() / f".{short(path.name)}.lock"


def short(name: str) -> str:
    """The name, or for a long one what tells it from others."""
    plain = os.fsencode(name)
    return name if len(plain) <= _NAME else f"{name[: _NAME // 4]}-{sha256(plain).hexdigest()[:16]}"


def _taken(file: Path, path: Path) -> int | None:
    """The open lock file; None on a file system without locks, where one has to do without."""
    for _ in range(_TRIES):
        handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            if not _lock(handle):
                raise _busy(path, _holder(handle))
            if _is(handle, file):
                with suppress(OSError):  # a full disk: then it does not say whose it is
                    os.truncate(handle, 0)
                    os.write(handle, json.dumps(_self()).encode())
                return handle
        except OSError as error:
            os.close(handle)
            if error.errno not in _UNSUPPORTED:
                raise
            with suppress(OSError):
                file.unlink()
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # of a file that its last holder has removed since we opened it
    raise _busy(path, "other processes")


def _release(handle: int, file: Path) -> None:
    """Remove the file while it is still ours; Windows removes none that is open."""
    if sys.platform == "win32":
        os.close(handle)
    with suppress(OSError):
        file.unlink()
    if sys.platform != "win32":
        os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> bool:
        os.lseek(handle, 1 << 20, os.SEEK_SET)  # behind what the file says, which then can be read
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(handle, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _lock(handle: int) -> bool:
        try:  # a record lock: unlike flock's, no child process takes it over and keeps it
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True


def _is(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _self() -> dict[str, object]:
    program = Path(sys.argv[0] or "python")
    name = program.parent.name if program.name == "__main__.py" else program.name
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join([name, *sys.argv[1:]])[:500],
    }


def _holder(handle: int) -> str:
    """What the lock file says of who holds it."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        said = json.loads(os.read(handle, 4096))
        host = "" if said["host"] == socket.gethostname() else f" on {said['host']}"
        return f"process {said['pid']}{host}, since {said['since']}: {said['command']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is just about to write it
        return "another process"


def _busy(path: Path, holder: str) -> OutputError:
    return OutputError(
        f"{path} is being written by {holder}", hint="Wait until that has ended, or write to another place."
    )
