"""Run one network on several batches at the same time, stopping all of them at every norm.

A norm can be repaired only when its outputs on all images are known, and what follows it must see the repaired ones.
With one batch that is a hook. With several, each batch's forward pass runs in a thread of its own, only one of them at
any moment; it stops at a norm until the others have arrived there. The cost is one forward pass over the images,
whatever their number, and what is held is what one forward pass over all of them holds between two layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

Job = Callable[[], object]


class _Stopped(BaseException):
    """Ends the forward pass of a batch whose result is no longer wanted; no `except Exception` catches it."""


class _Worker:
    def __init__(self, job: Job, context: Callable[[], AbstractContextManager[object]]) -> None:
        self.place: str | None = None
        self.stopping = False
        self.error: BaseException | None = None
        self._job, self._context = job, context
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.alive = True

    def start(self) -> None:
        self._thread.start()
        self._halted.acquire()

    def resume(self) -> None:
        self._go.release()
        self._halted.acquire()

    def wait_at(self, place: str) -> None:
        """Called in the worker's own thread."""
        self.place = place
        self._halted.release()
        self._go.acquire()
        self.place = None
        if self.stopping:
            raise _Stopped

    def stop(self) -> None:
        """End the thread, which may be running (after an interrupt), waiting at a place, or not yet started."""
        self.stopping = True
        if self._thread.ident is not None:
            self._go.release()
            self._thread.join()
        self.alive = False

    def _run(self) -> None:
        try:
            with self._context():
                self._job()
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.alive = False
            self._halted.release()


class Lockstep:
    """Runs jobs that call `arrive(place)`; `resolve(place)` is called when every job that still will has arrived.

    expected: for each job the places it is expected to arrive at, each at most once; a job that skips one of them or
    comes unannounced is not waited for in vain. context: entered in every thread (autocast and gradient modes are
    the thread's own).
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        expected: Sequence[set[str]],
        resolve: Callable[[str], None],
        context: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._jobs, self._expected, self._resolve, self._context = jobs, [set(e) for e in expected], resolve, context
        self._workers: list[_Worker] = []
        self.current = 0

    def arrive(self, place: str) -> None:
        """Stop the job that is running here until the place is resolved."""
        if len(self._jobs) == 1:
            self._resolve(place)
        else:
            self._workers[self.current].wait_at(place)

    def run(self) -> None:
        """Returns when all jobs have ended. What a job or `resolve` raises ends the others and is raised here."""
        if len(self._jobs) == 1:
            with self._context():
                self._jobs[0]()
            return
        self._workers = [_Worker(job, self._context) for job in self._jobs]
        try:
            for i in range(len(self._workers)):
                self._advance(i, start=True)
            while any(worker.alive for worker in self._workers):
                self._step()
        finally:
            for worker in self._workers:
                worker.stop()

    def _advance(self, i: int, *, start: bool = False) -> None:
        self.current, worker = i, self._workers[i]
        if start:
            worker.start()
        else:
            worker.resume()
        if worker.error is not None:
            raise worker.error

    def _step(self) -> None:
        """Resolve one place and let the jobs that waited there go on.

        All jobs stand still now, at places that may differ: some are ahead, or take a branch that others do not. A
        place is ready when no job that stands elsewhere is still expected there. Where none is ready, what was expected
        is wrong (two jobs that wait for each other); then the place with most jobs is resolved with those it has, so
        that the run always ends. Each job that goes on runs until its next place, or its end, before another one does.
        """
        waiting: dict[str, list[int]] = {}
        for i, worker in enumerate(self._workers):
            if worker.place is not None:
                waiting.setdefault(worker.place, []).append(i)
        place = next((p for p in waiting if not self._awaited(p)), None) or max(waiting, key=lambda p: len(waiting[p]))
        self._resolve(place)
        for i in waiting[place]:
            self._expected[i].discard(place)
        for i in waiting[place]:
            self._advance(i)

    def _awaited(self, place: str) -> bool:
        """Whether some job is still expected at the place."""
        pairs = zip(self._workers, self._expected, strict=True)
        return any(worker.alive and worker.place != place and place in expected for worker, expected in pairs)
