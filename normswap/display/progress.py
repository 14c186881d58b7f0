"""How far a long work is: one line that keeps changing, on a terminal or in a notebook. rich would crop it.

The step and the time left are on the line whatever its width; the name, figures and a bar are added as there is room.
"""

from __future__ import annotations

import html
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_BETWEEN = 0.1  # seconds between two redrawings
_LINES = 5.0  # seconds between two lines where there is no terminal
_LEAST_BAR, _MOST_BAR = 8, 24
_FIGURES = 32  # columns that figures get before the bar


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03`."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def line(what: str, done: int, total: int, left: float | None, text: str, columns: int) -> str:
    """A line of at most so many columns. left: seconds, None where they are not known yet."""
    fixed = f"{done}/{total}" + ("" if left is None else f" {duration(left)} left")
    if len(what) + 1 + len(fixed) <= columns:
        fixed = f"{what} {fixed}"
    room = columns - len(fixed)
    bar = min(_MOST_BAR, room - 1 - min(_FIGURES, len(text) + 1))
    if bar >= _LEAST_BAR and fixed.startswith(what):
        filled = round(bar * min(1.0, done / max(total, 1)))
        fixed = f"{what} {'━' * filled}{'─' * (bar - filled)}{fixed[len(what) :]}"
        room -= bar + 1
    figures = text.split(", ")
    while figures and len(", ".join(figures)) + 1 > room:
        figures.pop()
    return " ".join(filter(None, (fixed, ", ".join(figures))))[:columns]


class Line:
    """A progress line on a terminal. Call it with steps done, steps in all, and figures; `close` removes it."""

    def __init__(self, what: str, stream: TextIO) -> None:
        self._what, self._stream = what, stream
        self._began: tuple[float, int] | None = None
        self._last = 0
        self._drawn = 0.0
        self._shown = ""

    def __call__(self, done: int, total: int, text: str = "", *, left: float | None = None) -> None:
        now = time.monotonic()
        if self._began is None or done < self._last:  # the first call, or that of another stage
            self._began = now, done
        elif left is None and done > self._began[1]:
            left = (now - self._began[0]) / (done - self._began[1]) * (total - done)
        self._last = done
        if now - self._drawn < _BETWEEN and done < total:
            return
        self._drawn = now
        self._shown = line(self._what, done, total, left, text, self._columns())
        self._draw(self._shown)

    def above(self, text: str) -> None:
        """A line that stays."""
        self._draw("")
        self._stream.write(f"{text}\n")
        self._stream.flush()
        self._draw(self._shown)

    def close(self) -> None:
        """Leave nothing behind."""
        if self._shown:
            self._draw("")

    def _columns(self) -> int:
        return shutil.get_terminal_size().columns - 1

    def _draw(self, text: str) -> None:
        self._stream.write(f"\r\x1b[2K{text}")
        self._stream.flush()


class _Notebook(Line):
    """The same below a notebook's cell, in one output with the lines that stay, which scroll where they are many."""

    def __init__(self, what: str, display: Any) -> None:
        super().__init__(what, sys.stderr)
        self._display, self._handle = display, None
        self._kept: list[str] = []

    def above(self, text: str) -> None:
        self._kept.append(text)
        self._draw(self._shown)

    def _columns(self) -> int:
        return 100

    def _draw(self, text: str) -> None:
        lines = "\n".join([*self._kept, *filter(None, [text])])
        style = "max-height: 24em; overflow-y: auto"
        shown = {"text/plain": lines, "text/html": f'<pre style="{style}">{html.escape(lines)}</pre>' if lines else ""}
        if self._handle is None:
            self._handle = self._display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)


class Lines(Line):
    """A line of its own now and then, where nothing can be overwritten."""

    def __call__(self, done: int, total: int, text: str = "", *, left: float | None = None) -> None:
        if self._began is None:  # work that ends at once says nothing
            self._began, self._drawn = (time.monotonic(), done), time.monotonic()
        if time.monotonic() - self._drawn > _LINES:
            self._drawn = time.monotonic()
            self._stream.write(f"{self._what}: {done} of {total}{', ' * bool(text)}{text}\n")

    def _draw(self, text: str) -> None:
        pass


class Silent(Line):
    """Says nothing."""

    def above(self, text: str) -> None:
        pass

    def __call__(self, done: int, total: int, text: str = "", *, left: float | None = None) -> None:
        pass

    def _draw(self, text: str) -> None:
        pass


def _here(what: str) -> Line | None:
    """A line on this program's terminal or notebook; None where there is neither."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return Line(what, sys.stderr)
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if hasattr(shell, "kernel"):
        from IPython.display import display  # type: ignore[import-not-found,unused-ignore]

        return _Notebook(what, display)
    return None


@contextmanager
def shown(progress: bool | None, what: str) -> Iterator[Line | None]:
    """A progress line for the time of a work.

    progress: None shows one on a terminal and in a notebook, True everywhere, False nowhere.
    """
    found = None if progress is False else _here(what) or (Lines(what, sys.stderr) if progress else None)
    try:
        yield found
    finally:
        if found is not None:
            found.close()
