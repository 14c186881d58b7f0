"""Figures of the last steps, the time they took, the memory they need."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

BETWEEN = 0.1
"""Seconds between two reports of progress."""


class RunningMeans:
    """Figures of the steps since the last look; on a GPU they stay there until they are asked for."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}
        self.steps = self.samples = self.last = 0

    def add(self, step: int, loss: Tensor, sums: list[dict[str, Tensor]], samples: int) -> None:
        self.losses.append(loss)
        for each in sums:
            for name, value in each.items():
                self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps, self.samples, self.last = self.steps + 1, self.samples + samples, step

    def figures(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean loss of the steps, and the mean over the samples of everything that was summed up."""
        parts = [torch.stack(self.losses).double().sum().cpu(), torch.tensor(float(self.steps)).double()]
        parts += [torch.tensor(float(self.samples)).double()]
        parts += [value.double().cpu() for value in self.sums.values()]
        loss, steps, samples, *sums = total(torch.stack(parts)).tolist()
        return {"loss": loss / steps, **{n: v / max(samples, 1) for n, v in zip(self.sums, sums, strict=True)}}

    def now(self) -> dict[str, float]:
        """This process's figures, where reading them costs nothing."""
        if not self.losses or self.losses[-1].device.type != "cpu":
            return {}
        return self.figures(lambda value: value)


class Stopwatch:
    """Time spent training, without validations."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._begin = self._lap = time.perf_counter()
        self._told = 0.0
        self._drawn = self._row = self._begin
        self._paused = self._stopped = 0.0

    def pause(self) -> None:
        self._stopped = time.perf_counter()

    def resume(self) -> None:
        away = time.perf_counter() - self._stopped
        self._paused += away
        self._lap += away

    def lap(self, samples: int) -> float:
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        return samples / max(seconds, 1e-9)

    def total(self) -> float:
        return time.perf_counter() - self._begin

    def speed(self, samples: int, steps: int) -> float:
        return samples * steps / max(self.total() - self._paused, 1e-9)

    def left(self, done: int, left: int) -> float | None:
        return (self.total() - self._paused) / done * left if done else None

    def since_drawn(self) -> float:
        return time.perf_counter() - self._drawn

    def drawn(self) -> None:
        self._drawn = time.perf_counter()

    def since_row(self) -> float:
        now = time.perf_counter()
        since, self._row = now - self._row, now
        return since

    def since_told(self) -> float:
        now = time.perf_counter()
        since = now - self._told
        if since > BETWEEN:
            self._told = now
        return since


def memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import psutil  # accelerate's own

    return int(psutil.Process().memory_info().rss)
