"""Cells in several processes, one a device, each with one cell at a time."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ..display.progress import Line, Silent
from ..errors import Fix, NormswapError, OptionError, Text, first_line
from ..machine.devices import device_of
from ..sources.user_code import files_in, run_again
from ..training.signals import Signals
from .cells import Cell, CellResult
from .making import Maker

_POLL = 0.2  # seconds between two looks at whether a signal has come
_READY = "ready"
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def check_devices(devices: Sequence[str]) -> None:
    """Raise OptionError for what is no list of devices that are there."""
    if isinstance(devices, str) or not devices:
        raise OptionError(Text(Fix("devices"), f" takes a list, got {devices!r}"))
    for name in devices:
        device_of(name)


def in_parallel(
    maker: Maker, cells: Sequence[Cell], of: int, bar: Line, devices: Sequence[str]
) -> Generator[CellResult, None, None]:
    """What becomes of the cells, as they are finished; of: how many there are with those finished before.

    A process that dies, for want of memory say, is the error of its cell, and another takes its place. Ctrl-C, and
    whatever else ends the iteration, has each process save the state of its training and ends it.
    Raises NormswapError where the network or the data cannot be handed to another process.
    """
    todo, job = deque(cells), _job(maker, devices, isinstance(bar, Silent))
    workers: list[_Worker] = []
    number = of - len(cells)
    try:
        with Signals() as signals:
            workers.extend(_Worker.started(device, job) for device in devices[: len(cells)])
            while any(worker.busy for worker in workers):
                heard = wait([worker.pipe for worker in workers if worker.busy], _POLL)
                if signals.received is not None:
                    break
                for worker in [worker for worker in workers if worker.pipe in heard]:
                    result = worker.heard(maker)
                    if result is not None:
                        yield result
                    if result is not None and worker.dead and todo:
                        workers[workers.index(worker)] = worker = _Worker.started(worker.device, job)
                    elif not worker.dead and todo:
                        number += 1
                        bar.above(f"{todo[0].shown} ({number} of {of}) on {worker.device}")
                        worker.give(todo.popleft())
                    else:
                        worker.busy = False
        if signals.received is not None:
            _stop(workers)
            if signals.received == signal.SIGINT:
                raise KeyboardInterrupt
            signal.raise_signal(signals.received)
    finally:
        _stop(workers)


@dataclass
class _Worker:
    """One process. busy: something is to be heard of it yet. dead: it will do nothing more."""

    device: str
    process: Any
    pipe: Connection
    cell: Cell | None = None
    ready: bool = False
    busy: bool = True
    dead: bool = False

    @classmethod
    def started(cls, device: str, job: bytes) -> _Worker:
        """Deaf to Ctrl-C: a terminal's goes to all its processes, and each is to be stopped once, by the first."""
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, device), name=f"normswap compare on {device}")
        with _deaf():
            process.start()
        theirs.close()
        worker = cls(device, process, ours)
        with suppress(OSError):  # it is heard of below
            ours.send_bytes(job)
        return worker

    def give(self, cell: Cell) -> None:
        """Have it make the cell."""
        self.cell = cell
        with suppress(OSError):  # likewise
            self.pipe.send(cell)

    def heard(self, maker: Maker) -> CellResult | None:
        """What it has to say: a result, or, at its start, that it is ready. Raises NormswapError where it is not."""
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            self.dead = True
            said = f"the process on {self.device} ended ({_end(self.process.exitcode)})"
        if isinstance(said, CellResult):
            self.cell = None
            return said
        if said == _READY:
            self.ready = True
            return None
        if not self.ready:
            main = "a script that calls compare needs `if __name__ == '__main__':` around the call, and " * self.dead
            raise NormswapError(
                f"no process could be started on {self.device}: {said}",
                hint=f"{main}the classes of network and data have to be in a file that can be imported.".capitalize(),
            )
        cell, self.cell = self.cell, None
        if cell is None:
            return None
        result = CellResult(cell, error=said, figure=maker.setting.figure)
        result.keep(maker.setting.of(cell.name))
        return result


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            hint = ", perhaps for want of memory" if -code == getattr(signal, "SIGKILL", None) else ""
            return signal.Signals(-code).name + hint
    return f"exit code {code}"


@contextmanager
def _deaf() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(workers: Sequence[_Worker]) -> None:
    """SIGTERM, at which a training ends its step and saves its state. A Ctrl-C meanwhile ends them at once."""
    try:
        for worker in workers:
            worker.pipe.close()
            if worker.cell is not None or not worker.ready:
                worker.process.terminate()
        for worker in workers:
            worker.process.join()
    except KeyboardInterrupt:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
        raise


def _job(maker: Maker, devices: Sequence[str], silent: bool) -> bytes:
    """All that a process has to know. Raises OptionError for what cannot be sent to one."""
    cpus = sum(name == "cpu" for name in devices)
    threads = max(1, torch.get_num_threads() // max(1, cpus))
    model = copy.deepcopy(maker.model).cpu()
    try:
        sent = pickle.dumps(replace(maker, model=model, batches=None))
        return pickle.dumps((sent, files_in(sent), threads, list(warnings.filters), silent))
    except Exception as error:  # of pickle, or of whatever the network and the data are made of
        raise OptionError(
            Text(Fix("devices"), f": network and data cannot be handed to other processes ({first_line(error)})"),
            hint="Their classes have to be in a file that can be imported, and hold neither lambdas nor open files.",
        ) from error


def _work(pipe: Connection, device: str) -> None:
    """The other process: makes each cell that it is told of, until nobody tells it of one."""
    if hasattr(os, "setpgid"):  # a group of its own, which a terminal's Ctrl-C does not reach
        os.setpgid(0, 0)
    sys.stdout = sys.stderr  # where the result's alone goes
    try:
        sent, files, threads, filters, silent = pickle.loads(pipe.recv_bytes())
        warnings.filters[:] = filters  # type: ignore[index]
        if silent:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        run_again(files)
        maker: Maker = pickle.loads(sent)
        maker.setting = replace(maker.setting, device=_alone(device))
        if maker.measure is not None:
            maker.measure = replace(maker.measure, setting=maker.setting)
        if device == "cpu":
            torch.set_num_threads(threads)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {first_line(error)}")
        return
    with suppress(EOFError, OSError):  # the first process ended
        pipe.send(_READY)
        while True:
            pipe.send(maker.result(pipe.recv()))


def _alone(device: str) -> str:
    """Let this process see no other GPU, so that all libraries take this one."""
    kind, _, index = device.partition(":")
    if kind == "cuda" and index:
        seen = os.environ.get(_VISIBLE)
        os.environ[_VISIBLE] = index if not seen else seen.split(",")[int(index)]
    return kind
