"""Which signals end a run at the end of a step, and what further ones do."""

from __future__ import annotations

import io
import signal
import sys

import pytest

from normswap.cli.terminal.streams import Lasting
from normswap.training.signals import Signals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
NUMBERS = ("SIGINT", "SIGTERM", "SIGHUP")


@pytest.fixture
def heard():
    """What reaches the handlers that were there before."""
    found: list[int] = []
    before = {}
    for name in NUMBERS:
        number = getattr(signal, name)
        before[number] = signal.signal(number, lambda number, frame: found.append(number))
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_first_signal_is_noted_and_every_handler_comes_back(name: str, heard: list[int]) -> None:
    number = getattr(signal, name)
    with Signals() as signals:
        signal.raise_signal(number)
        assert (signals.received, heard) == (number, [])
    for other in NUMBERS:
        signal.raise_signal(getattr(signal, other))
    assert heard == [getattr(signal, other) for other in NUMBERS]


def test_a_second_ctrl_c_does_what_it_did_before(heard: list[int]) -> None:
    with Signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert heard == [signal.SIGINT]


@pytest.mark.parametrize("first", NUMBERS)
def test_a_closed_terminal_may_say_so_many_times(first: str, heard: list[int]) -> None:
    with Signals() as signals:
        signal.raise_signal(getattr(signal, first))
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert (signals.received, heard) == (getattr(signal, first), [])


def test_a_closed_terminal_that_is_ignored_stays_so(heard: list[int]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.received is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_stream_without_a_reader_loses_what_is_said_and_stops_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str = "") -> int:
            raise OSError(5, "Input/output error")

        def flush(self) -> None:
            self.write()

    stream = Lasting(Gone())
    print("lost", file=stream, flush=True)
    assert not stream.isatty()
