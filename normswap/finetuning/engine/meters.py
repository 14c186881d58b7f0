"""Figures of the last steps, the time they took, the memory they need."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

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
                self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value
        self.steps, self.samples, self.last = self.steps + 1, self.samples + samples, step

    def carry(self, values: Mapping[str, Any]) -> None:
        """Go on from what `partial` gave."""
        self.steps, self.samples, self.last = (round(values[name]) for name in ("steps", "samples", "last"))
        self.losses = [torch.tensor(values["loss"], dtype=torch.float64)]
        self.sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in values["sums"].items()}

    def partial(self, total: Callable[[Tensor], Tensor], processes: int) -> dict[str, Any] | None:
        """Each process's share of what was summed up over all, which stays; JSON values, None before the first step."""
        if not self.steps:
            return None
        loss, steps, samples, *sums = (value / processes for value in self._totals(total))
        told = {"loss": loss, "steps": steps, "samples": samples, "last": self.last}
        return {**told, "sums": dict(zip(self.sums, sums, strict=True))}

    def _totals(self, total: Callable[[Tensor], Tensor]) -> list[float]:
        """Losses, steps, samples and all else, summed up."""
        device = self.losses[-1].device  # of what a resumed run has carried over, which is one number, too
        parts = [torch.stack([loss.to(device) for loss in self.losses]).double().sum().cpu()]
        parts += [torch.tensor(float(count)).double() for count in (self.steps, self.samples)]
        parts += [value.double().cpu() for value in self.sums.values()]
        return [float(value) for value in total(torch.stack(parts)).tolist()]

    def figures(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean loss of the steps, and the mean over the samples of everything that was summed up."""
        loss, steps, samples, *sums = self._totals(total)
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
