"""Ctrl-C, SIGTERM and SIGHUP, heard at the end of a step, when everything belongs together."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
STOPPING = [number for number in (signal.SIGINT, signal.SIGTERM, _HANGUP) if number is not None]


class Signals:
    """Within it, the first signal that stops a run is only noted in `received`; a second one does what it did before.

    SIGHUP, of a terminal that was closed, comes several times: from the kernel, from the shell. A second one changes
    nothing, and neither does any where it is ignored, as under nohup.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number == _HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore(*self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._restore(*(n for n in self._before if n != _HANGUP))
        self.received = number if self.received is None else self.received

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            signal.signal(number, self._before.pop(number))
