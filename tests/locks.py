"""A lock that another process holds."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import normswap

HOLDER = """
import sys, time
from pathlib import Path
from normswap.files.locking import locked

with locked(Path(sys.argv[1])):
    print("HELD", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `path`, until its stdin ends."""
    environment = {**os.environ, "PYTHONPATH": str(Path(normswap.__file__).parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], text=True, env=environment, **pipes) as process:
        timer = threading.Timer(60, process.kill)
        timer.start()
        try:
            assert process.stdout.readline() == "HELD\n"
            yield process
        finally:
            timer.cancel()
            process.kill()
