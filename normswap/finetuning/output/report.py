"""What a fine-tuning tells: while it runs, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...display.overview import ReportInNotebook, Table
from ...display.progress import Line, shown
from ...errors import plural
from .by_class import Cells, ClassFigure, ToldByClass, matrix
from .epoch_table import EpochTable, Row
from .metrics_log import curves
from .panel import Panel
from .plots import confusion, png

_WORST = 10  # classes in a notebook


@dataclass(frozen=True)
class Progress:
    """Where a run stands, as `progress=` is told of it, several times a second at most.

    step: of `steps`. epoch: passes over the training set so far. figures: means over the last steps (loss, accuracy),
    or, when `validation`, over the validation set. samples_per_second: over all processes, of the last steps.
    memory: bytes, peak on the GPU or now on the CPU. seconds_left: None until it can be told. row: of the table of
    epochs, at the end of one and at the start.
    """

    step: int
    steps: int
    epoch: float
    figures: dict[str, float]
    samples_per_second: float
    memory: int
    seconds_left: float | None
    validation: bool = False
    row: Row | None = None


@contextmanager
def told(progress: Callable[[Progress], None] | bool | None) -> Iterator[Callable[[Progress], None] | None]:
    """What a run tells: the caller's function, or a line of its own (see `progress.shown`)."""
    if callable(progress):
        yield progress
        return
    with shown(progress, "training") as line:
        yield None if line is None else Teller(line)


class Teller:
    """The table of epochs above the line, all else in it."""

    def __init__(self, line: Line) -> None:
        self._line, self._table = line, EpochTable()

    def __call__(self, now: Progress) -> None:
        if now.row is None:
            show(self._line, now)
            return
        for text in self._table.lines(now.row):
            self._line.above(text)


def show(line: Line, now: Progress) -> None:
    """Where the run stands, in a line."""
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in now.figures.items())
    text = f"{figures}, {now.samples_per_second:.3g} images/s, {now.memory / 2**30:.2f} GiB"
    line(now.step, now.steps, text, left=now.seconds_left)


@dataclass(frozen=True)
class FinetuneReport(ToldByClass, ReportInNotebook):
    """The result of `finetune`.

    steps: how many were done, of `planned`; processes: how many trained together. figures: the last of training, means
    over the steps from the first to the last of `window`, and of validation, over `validation_images` at the step
    `validated_at`, which after an interruption is an earlier one; best: the best validation figure, `best_at`: the step
    it was reached at. last_file, best_file, state, curves, examples, matrix: the files written, None where there is no
    output folder. classes, names, confusion: of that validation (see `ByClass`; `worst` has the worst class first);
    matrix is its picture. bad: samples that could not be read. history: the lines of metrics.jsonl, written or not,
    which a notebook shows in `panels`.
    """

    steps: int
    planned: int
    epochs: float
    processes: int
    global_batch: int
    lr: float
    seconds: float
    samples_per_second: float
    figures: dict[str, float]
    before: dict[str, float]
    best_name: str
    best: float | None = None
    best_at: int | None = None
    last_file: Path | None = None
    best_file: Path | None = None
    state: Path | None = None
    curves: Path | None = None
    examples: Path | None = None
    matrix: Path | None = None
    interrupted: bool = False
    resumed_at: int = 0
    window: tuple[int, int] | None = None
    validated_at: int | None = None
    validation_images: int = 0
    task: str = "classification"
    classes: tuple[ClassFigure, ...] = field(default=(), repr=False)
    names: tuple[str, ...] = field(default=(), repr=False)
    confusion: Cells = field(default=(), repr=False)
    bad: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    history: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    panels: tuple[Panel, ...] = field(default=(), repr=False)

    def over(self, name: str) -> str:
        """What one of the figures is over, as `steps 181 to 200`."""
        if name.startswith("val_"):
            many = "s" * (self.validation_images != 1)
            return f"over {self.validation_images} image{many} at step {self.validated_at}"
        first, last = self.window or (0, 0)
        return f"over steps {first} to {last}" if first < last else f"of step {last}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = asdict(self) | self.classes_to_dict() | {"bad": list(self.bad), "notes": list(self.notes)}
        shown = {k: v for k, v in values.items() if k not in ("history", "panels")}
        return {k: str(v) if isinstance(v, Path) else v for k, v in shown.items()}

    def _tables(self) -> list[Table]:
        return [self.classes_table(self.task, _WORST)] * (len(self.classes) > 1)

    def _pictures(self) -> Iterator[tuple[str, Path | bytes | None]]:
        """Those of the output folder; what needs nothing but figures is drawn where there is none."""
        yield "curves", self.curves or self._drawn_curves()
        yield "confusion", self.matrix or self._drawn_matrix()
        yield "examples", self.examples

    def _drawn_curves(self) -> bytes | None:
        best = None if self.best_at is None else (self.best_name, self.best_at)
        canvas = curves(self.history, self.panels, "", best)
        return None if canvas is None else png(canvas)

    def _drawn_matrix(self) -> bytes | None:
        canvas = confusion(*matrix(self)) if self.confusion else None
        return None if canvas is None else png(canvas)

    def __str__(self) -> str:
        cut = f" of {self.planned}, interrupted" if self.interrupted else ""
        much = f"{self.epochs:.3g} epoch{'s' * (self.epochs != 1)}, global batch {self.global_batch}"
        lines = [f"fine-tuned for {plural(self.steps, 'step')}{cut} ({much})"]
        lines += [f"{name}: {value:.4g}, {self.over(name)}" for name, value in self.figures.items()]
        if self.best is not None:
            lines.append(f"best {self.best_name}: {self.best:.4f} at step {self.best_at}")
        return "\n".join([*lines, *self.told_worst(), *self.notes])
