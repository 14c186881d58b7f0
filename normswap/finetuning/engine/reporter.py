"""What a run tells as it goes: progress to the caller, figures and pages to its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..output.epoch_table import Row
from ..output.metrics_log import MetricsLog
from ..output.panel import Panel
from ..output.report import Progress
from ..output.trackers import Trackers
from ..settings import RunOptions, Settings
from .meters import BETWEEN, RunningMeans, Stopwatch, memory

_BETWEEN_PAGES = 20.0  # seconds: drawing takes about one


class RunReporter:
    """main: whether this process is the one that tells; the others only sum up.

    began: the step at which the run began or was resumed. clock: stopped for what is not training. window: the first
    and the last of the steps that the figures of the last look are over. notes: what went wrong, at the end.
    """

    def __init__(
        self,
        settings: Settings,
        place: RunOptions,
        device: torch.device,
        *,
        main: bool,
        tell: Callable[[Progress], None] | None,
    ) -> None:
        self.settings, self.main, self.clock = settings, main, Stopwatch()
        self._place, self._device, self._tell = place, device, tell if main else None
        self._window, self._carried = RunningMeans(), 0  # carried: samples of before this run was resumed
        self.window: tuple[int, int] | None = None
        self._losses: list[tuple[float, int]] = []  # since the last row: mean losses, and over how many steps
        self._journal: MetricsLog | None = None
        self._trackers: Trackers | None = None

    def begin(self, step: int) -> None:
        """From now on the clock runs."""
        self.began = step
        self.clock.start()

    def open(self) -> None:
        """From now on figures are written down."""
        place, folder = self._place, self._place.output if self.main else None
        self.clock.pause()  # trackers take their time
        if self.main and place.track:
            self._trackers = Trackers(place.track, folder, asdict(self.settings), resume=place.resume)
        self._journal = MetricsLog(
            folder, step=self.began, tensorboard=place.tensorboard and self.main, trackers=self._trackers
        )
        self.clock.resume()

    def end(self) -> None:
        """Close the files."""
        if self._journal is not None:
            self._journal.close()
        self.notes = [] if self._trackers is None else list(self._trackers.failed)

    def step(self, step: int, loss: Tensor, sums: list[dict[str, Tensor]], samples: int) -> None:
        """One step is done; on a GPU its figures stay there until `look`."""
        self._window.add(step, loss, sums, samples)

    def partial(self, total: Callable[[Tensor], Tensor]) -> dict[str, Any] | None:
        """What was summed up since the last look, for a resumed run to go on from."""
        return self._window.partial(total, self.settings.processes)

    def carry(self, values: dict[str, Any] | None) -> None:
        """Go on from what `partial` gave to the state of the run."""
        self._window = RunningMeans()
        if values is not None:
            self._window.carry(values)
        self._carried = self._window.samples

    def look(self, step: int, rate: float, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the steps since the last look and over all processes, written down."""
        window = self._window
        if not window.steps:
            return {}
        figures = window.figures(total)
        speed = self.clock.lap((window.samples - self._carried) * self.settings.processes)
        self._carried = 0
        self._write(step, {**figures, "lr": rate, "samples_per_second": round(speed, 2)})
        self._losses.append((figures["loss"], window.steps))
        self.window = (window.last - window.steps + 1, window.last)
        self._window = RunningMeans()
        return figures

    def validated(self, step: int, figures: dict[str, float]) -> None:
        """Write down the figures of a validation."""
        self._write(step, figures)

    def row(self, step: int, figures: dict[str, float], shown: Iterable[str], rate: float, best: bool) -> None:
        """Tell of an epoch that ends. figures: of its validation, if there was one; shown: those for the table."""
        steps = sum(count for _, count in self._losses)
        loss = sum(loss * count for loss, count in self._losses) / steps if steps else None
        self._losses = []
        epoch, seconds = step / self.settings.epoch, self.clock.since_row()
        picked = {name: figures[name] for name in dict.fromkeys(shown) if name in figures}
        row = Row(epoch, step, loss, picked, rate if steps else None, seconds, best)
        if self._tell is not None:
            self._tell(replace(self._progress(step, figures), validation=bool(figures), row=row))

    def progress(self, step: int, figures: dict[str, float]) -> None:
        """Tell where the run stands, several times a second at most. figures: the last ones that were read."""
        if self._tell is not None and self.clock.since_told() > BETWEEN:
            self._tell(self._progress(step, self._window.now() or figures))

    @property
    def history(self) -> tuple[dict[str, Any], ...]:
        """The lines of metrics.jsonl, also where none is written."""
        return () if self._journal is None else tuple(self._journal.lines)

    def pages_due(self) -> bool:
        """Whether it is time to draw again."""
        return self.clock.since_drawn() > _BETWEEN_PAGES

    def draw(self, folder: Path, panels: tuple[Panel, ...], best: tuple[str, int] | None) -> None:
        """Write curves.png. best: the figure and the step that get a star."""
        if self._journal is not None:
            self._journal.draw(panels, folder.name, best)
        self.clock.drawn()

    def speed(self, step: int) -> float:
        """Samples a second in all of training so far, over all processes."""
        return self.clock.speed(self.settings.global_batch, step - self.began)

    def _write(self, step: int, figures: dict[str, Any]) -> None:
        if self.main and self._journal is not None:
            self._journal.write({"step": step, "epoch": round(step / self.settings.epoch, 4), **figures})

    def _progress(self, step: int, figures: dict[str, float]) -> Progress:
        left = self.clock.left(step - self.began, self.settings.steps - step)
        epoch = step / self.settings.epoch
        return Progress(step, self.settings.steps, epoch, figures, self.speed(step), memory(self._device), left)
