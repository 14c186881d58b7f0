"""What this machine can take at most: a request beyond it is refused before it ends in a kill without a word."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

from ..errors import Fix, OptionError, Text

PER_CORE = 4
"""So many worker processes a core at most; beyond it they only wait for each other."""
WORKER = 200 * 2**20
"""What a worker process needs at least: Python and torch, in bytes."""
IMAGE = 2
"""An image is held so many times at least: by itself, and in its batch."""


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def free_memory() -> float:
    """Bytes of main memory that can still be had, infinity where the system does not say."""
    found = math.inf
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if found == math.inf and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # a container's limit, "max" for none
        found = min(found, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def check_workers(workers: int) -> None:
    """Raise OptionError for more worker processes than the machine takes."""
    there = cores()
    if workers > max(8, PER_CORE * there):
        raise OptionError(
            f"{workers} worker processes on {there} core{'s' * (there != 1)} would only wait for each other",
            hint=Text(Fix("workers", there), ", or leave it out."),
        )
    check_memory(workers * WORKER, f"{workers} worker processes", Text("Take fewer ", Fix("workers"), "."))


def check_images(height: int, width: int, batch_size: int = 1) -> None:
    """Raise OptionError where not even a batch of RGB images of this size fits in memory, let alone a network."""
    images = "an image" if batch_size == 1 else f"a batch of {batch_size} images"
    smaller: list[str | Fix] = [" or a smaller ", Fix("batch_size")] if batch_size > 1 else []
    fewer = Text("Take smaller images with ", Fix("size"), *smaller, ".")
    check_memory(IMAGE * batch_size * 3 * height * width * 4, f"{images} of {height}x{width} pixels", fewer)


def check_memory(needed: float, what: str, hint: str) -> None:
    """Raise OptionError for `what` if it needs more bytes than are free."""
    free = free_memory()
    if needed > free:
        raise OptionError(f"{what} would need {_size(needed)} of memory, and {_size(free)} are free", hint=hint)


def _size(count: float) -> str:
    units = ("MiB", "GiB", "TiB", "PiB")
    power = min(len(units) - 1, max(0, int(math.log(max(count, 1), 1024)) - 2))
    return f"{count / 1024 ** (power + 2):.3g} {units[power]}"
