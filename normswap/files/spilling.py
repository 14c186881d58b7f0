"""Tensors in files instead of memory: mapped, and given back to the system as soon as an operation has used them.

What torch and safetensors read from a file is memory-mapped. A page of it stays in memory once it was touched, though,
so that whoever goes through a whole checkpoint holds the whole in the end. Within `Spilling`, the pages of mapped
tensors are let go after each operation; the next one that touches them has them read again. Pages that somebody has
written to since, in whatever way, are kept: they are in no file.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .writing import told

LEAST = 1 << 14
"""Tensors below so many bytes are not worth a file."""
_BLOCK = 1 << 24  # bytes that are copied at a time
_OFTEN = 1 << 25  # bytes that are spilled between two times of tidying up
_MAPS, _PAGES = Path("/proc/self/maps"), Path("/proc/self/pagemap")
_ACTIVE: list[Spilling] = []


class Spilling(TorchDispatchMode):
    """Within it, what `spilled` and `room` give lies in files, and mapped tensors hold no memory between operations.

    folder: where the files lie; they have no names, so that nothing is left of them however the process ends. Memory is
    given back on Linux; elsewhere the system does so when it runs short.
    """

    def __init__(self, folder: Path, least: int = LEAST) -> None:
        super().__init__()
        self._folder, self._least = folder, least
        self._mapped: dict[int, tuple[StorageWeakRef, bool]] = {}
        self._last: list[tuple[StorageWeakRef, int, int]] = []
        self._names: list[str] = []  # of files that are still to be removed
        self._since = 0
        self._libc = ctypes.CDLL(None, use_errno=True) if _MAPS.exists() else None

    def __enter__(self) -> Spilling:
        import torch._dynamo  # noqa: F401  # a mode's first operation does, for a second in which torch drops a Ctrl-C

        _ACTIVE.append(self)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        _ACTIVE.remove(self)
        for name in self._names:
            with suppress(OSError):
                os.unlink(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._let_go_last()
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (known := self._known(tensor)) is not None:
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                span = tensor.data_ptr(), (last + 1) * tensor.element_size()
                self._last.append((known[0], *span))  # what reads it without an operation comes after this one
                self._let_go(*span, shared=known[1])
        return out

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Tell of tensors that may lie in mapped files. Those that do not are left alone."""
        ranges = _file_ranges() if self._libc is not None else []
        for tensor in tensors:
            storage = tensor.untyped_storage() if tensor.layout is torch.strided else None
            if storage is None or not storage.nbytes() or tensor.device.type != "cpu":
                continue
            start = storage.data_ptr()
            if any(low <= start and start + storage.nbytes() <= high for low, high in ranges):
                self._mapped[start] = StorageWeakRef(storage), False

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor without values, in a file. Raises OutputError where the disk has no room for it."""
        size = math.prod(shape) * dtype.itemsize
        if size < max(1, self._least):
            return torch.empty(tuple(shape), dtype=dtype)
        with told(self._folder):
            handle, name = tempfile.mkstemp(prefix=".normswap-", suffix=".spill", dir=self._folder)
            try:
                if hasattr(os, "posix_fallocate"):  # a full disk is told now, and not by a signal when it is written to
                    os.posix_fallocate(handle, 0, size)
                storage: Any = torch.UntypedStorage.from_file(name, True, size)
            finally:
                os.close(handle)
                try:
                    os.unlink(name)
                except OSError:  # Windows removes none that is open
                    self._names.append(name)
        self._mapped[storage.data_ptr()] = StorageWeakRef(storage), True
        self._since += size
        if self._since > _OFTEN:
            self._trim()
        return torch.empty(0, dtype=dtype).set_(storage).view(tuple(shape))

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor's values in a file; in memory where they are few, or do not lie one after the other."""
        if not tensor.is_contiguous() or tensor.nbytes < self._least or tensor.device.type != "cpu":
            return tensor.clone()
        made = self.room(tensor.shape, tensor.dtype)
        flat, into = tensor.view(-1), made.view(-1)
        step = max(1, _BLOCK // tensor.element_size())
        for start in range(0, len(flat), step):
            into[start : start + step].copy_(flat[start : start + step])
        return made

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether it is one that `room` gave, which may be written to."""
        return (known := self._known(tensor)) is not None and known[1]

    def release(self) -> None:
        """Let go of all that is mapped, whatever has touched it."""
        for start, (ref, shared) in list(self._mapped.items()):
            storage = None if ref.expired() else torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
            if storage is None:
                del self._mapped[start]
            else:
                self._let_go(start, storage.nbytes(), shared=shared)
        self._last.clear()
        self._trim()

    def _trim(self) -> None:
        """Let go of what was freed: glibc keeps blocks below 32 MB, and finds no use for many of them."""
        self._since = 0
        if (trim := getattr(self._libc, "malloc_trim", None)) is not None:
            trim(0)

    def _known(self, tensor: Tensor) -> tuple[StorageWeakRef, bool] | None:
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or not tensor.numel():
            return None
        start = tensor.untyped_storage().data_ptr()
        known = self._mapped.get(start)
        if known is not None and known[0].expired():  # the address is another's by now
            del self._mapped[start]
            return None
        return known

    def is_private(self, tensor: Tensor) -> bool:
        """Whether it lies in a file that was read."""
        return (known := self._known(tensor)) is not None and not known[1]

    def _let_go_last(self) -> None:
        for ref, start, size in self._last:
            if not ref.expired():
                self._let_go(start, size, shared=False)
        self._last.clear()

    def _let_go(self, start: int, size: int, *, shared: bool) -> None:
        if self._libc is None:
            return
        low = start - start % mmap.PAGESIZE
        length = start + size - low
        if not shared and _written_to(low, length):
            return
        self._libc.madvise(ctypes.c_void_p(low), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_DONTNEED))


def spilling() -> bool:
    """Whether some `Spilling` is on."""
    return bool(_ACTIVE)


def mapped(tensors: Iterable[Tensor]) -> None:
    """Tell the `Spilling` that is on, if any, of tensors that were just read from files."""
    if _ACTIVE:
        _ACTIVE[-1].note(tensors)


def spilled(tensor: Tensor) -> Tensor:
    """The tensor in a file that may be written to; itself where nothing is spilled, or it is there already."""
    return tensor if not _ACTIVE or _ACTIVE[-1].is_shared(tensor) else _ACTIVE[-1].copy(tensor)


def spilled_copy(tensor: Tensor) -> Tensor:
    """A copy of the tensor, in a file where tensors are spilled."""
    return _ACTIVE[-1].copy(tensor) if _ACTIVE else tensor.clone()


def room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU without values, in a file where tensors are spilled."""
    return _ACTIVE[-1].room(shape, dtype) if _ACTIVE else torch.empty(tuple(shape), dtype=dtype)


def lent(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """By id, another tensor of the same memory for each in a file that was read; none where nothing is spilled."""
    found: dict[int, Tensor] = {}
    for tensor in tensors if _ACTIVE else ():
        if _ACTIVE[-1].is_private(tensor):
            other = tensor.detach()
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            found[id(tensor)] = torch.nn.Parameter(other, tensor.requires_grad) if is_parameter else other
    return found


def release() -> None:
    """Let go of the memory of all mapped tensors, where they are spilled."""
    if _ACTIVE:
        _ACTIVE[-1].release()


def _written_to(low: int, length: int) -> bool:
    """Whether memory of this process, from a page's start on, holds what no file does; True where that is not told.

    The kernel is asked, since not every write is an operation: NumPy, other libraries and other threads write too.
    Source: Linux, Documentation/admin-guide/mm/pagemap.rst.
    """
    count = -(-length // mmap.PAGESIZE)
    try:
        with _PAGES.open("rb", buffering=0) as file:
            said = os.pread(file.fileno(), 8 * count, low // mmap.PAGESIZE * 8)
    except OSError:
        return True
    pages = np.frombuffer(said, np.uint64)
    held, of_a_file = pages & np.uint64(0b11 << 62), pages & np.uint64(1 << 61)  # in memory or swapped out
    return len(pages) < count or bool(((held != 0) & (of_a_file == 0)).any())


def _file_ranges() -> list[tuple[int, int]]:
    """Addresses of this process where files are mapped; letting go of any other memory would lose what it holds."""
    found: list[tuple[int, int]] = []
    for line in _MAPS.read_text("utf-8", "replace").splitlines():
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            low, high = (int(end, 16) for end in span.split("-"))
            if found and found[-1][1] == low:
                low = found.pop()[0]
            found.append((low, high))
    return found
