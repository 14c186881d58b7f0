"""Fine-tuning as the engine runs it: batches, validations, checkpoints. What is learnt is the `Task`'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, DataError, Fix, Text
from ...modules.restore import evaluating, undisturbed
from ...training.distributed import all_or_none, gathered
from ...training.engine import Engine
from ...training.optimizer import build_optimizer
from ...training.seeding import seed_step
from ...training.signals import Signals
from ...training.updates import NonFinite, Updates
from ..datasets.loader import Loaded, spread
from ..datasets.splits import Sets
from ..output.by_class import ByClass
from ..output.layout import BEST, CONFUSION, CURVES, EXAMPLES, LAST, STATE, clear
from ..output.plots import write_matrix
from ..output.report import FinetuneReport, Progress
from ..settings import RunOptions, Settings
from ..tasks.base import Meter, Task, on_device
from .accelerator import Processes, compiled
from .batches import Batches
from .checkpointer import Checkpointer, RunState
from .failures import explain, is_memory
from .intervals import Due
from .monitor import Monitor
from .optimizer import averaged
from .reporter import RunReporter

LOOKS = 20
"""After so many steps the loop looks at what it has summed up: on a GPU, looking means waiting for it."""
_SHOWN = 6  # pictures of the validation set in examples.png


@dataclass(frozen=True)
class Job:
    """What a run is about, beside the network: sets are its training and validation data."""

    task: Task
    settings: Settings
    place: RunOptions
    sets: Sets


class Trainer:
    """One run. `run` does the steps that are left and leaves the network trained.

    parameters: those that train. flags: `requires_grad` of all, as the files are to have it.
    """

    def __init__(
        self,
        model: nn.Module,
        job: Job,
        parameters: Mapping[str, nn.Parameter],
        flags: Mapping[str, bool],
        accelerator: Any,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.model, self.task, self.settings, self.place = model, job.task, job.settings, job.place
        self.accelerator, self.processes = accelerator, Processes(accelerator)
        settings, place = self.settings, self.place
        self.main: bool = accelerator.is_main_process
        self.device: torch.device = accelerator.device
        self.channels_last = bool(place.channels_last)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        self.average = averaged(model, settings.ema) if settings.ema else None
        optimizer = build_optimizer(model, parameters, settings.optimizer, settings.weight_decay)
        self.forward: Any = accelerator.prepare_model(model) if self.processes.together else model
        self.updates = Updates(
            optimizer, settings.schedule, settings.clip_grad,
            scaler=accelerator.scaler, forward=self.forward, prompt=self.device.type == "cpu",
        )  # fmt: skip
        self.checkpointer = Checkpointer(
            place.output, settings, model, self.average, self.updates, flags, main=self.main
        )  # fmt: skip
        self._sets = job.sets
        self.batches = Batches(self.task, settings, place, job.sets, accelerator)
        self.state = RunState()
        self.monitor = Monitor(settings, self.task.best)
        self._between = Due(place.checkpoint_every, self.processes, LOOKS)
        self.engine = Engine(self, self.updates, settings.steps)
        self._samples, self._sums = 0, list[dict[str, Tensor]]()
        self._agreed, self._midway = 0, False
        self._meter: Meter | None = None  # of the last validation
        self.reporter = RunReporter(settings, place, self.device, main=self.main, tell=progress)

    # --- the run ------------------------------------------------------------------------------------------------

    def run(self, *, resume: bool) -> FinetuneReport:
        """Do the steps that are left. Raises NormswapError subclasses, after which the last checkpoint is whole."""
        if resume:
            with all_or_none():
                self._restore()
            self._check_step()
        self.reporter.begin(self.step)
        if resume:
            self.reporter.open()
        try:
            whole = compiled(self.forward, self.model, self.task.compiled_part)
            with whole if self.place.compile else nullcontext(self.forward) as self.forward, Signals() as self.signals:
                self.model.train()
                self.engine.run()
        finally:
            self.batches.close()
            self.reporter.end()
        if self.ended and self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        return self.report()

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.updates.step

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or no better network is expected of those that are left."""
        return self.step == self.settings.steps or self.monitor.exhausted(self.state)

    @property
    def stopped_by(self) -> int | None:
        """The signal that ended the run early, None for a run that is complete."""
        return self.signals.received if not self.ended or self.engine.pending else None

    def _check_step(self) -> None:
        """The file of another node may be an older one. Raises CheckpointError."""
        steps = gathered(self.step)
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"the processes have states of different steps, {', '.join(map(str, steps))}",
                hint=Text("Give all nodes the same ", Fix("output"), " folder, or copy that of the first one."),
            )

    def _restore(self) -> None:
        """Go on from the last checkpoint."""
        found = self.checkpointer.restore()
        if found is not None:
            self.state, self.engine.measured = found
            self.reporter.carry(self.state.partial)

    # --- what a `Lesson` has to have -----------------------------------------------------------------------------

    def passes(self, step: int) -> list[Callable[[], Tensor]]:
        loaded = self.batches.of_step(step)
        seed_step(self.settings.seed * 0x10001 + self.accelerator.process_index, step)
        self._samples, self._sums = sum(batch.count for batch in loaded), []
        return [partial(self._loss, batch) for batch in loaded]

    def _loss(self, batch: Loaded) -> Tensor:
        content = on_device(batch.content, self.device, channels_last=self.channels_last)
        with self.accelerator.autocast():
            outcome = self.task.outcome(self.forward, content)
        self._sums.append(dict(outcome.sums))
        return outcome.loss

    def stepped(self, loss: Tensor) -> None:
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.reporter.step(self.step, loss, self._sums, self._samples)
        if self.step % LOOKS == 0 or self.step == self.settings.steps:
            self._look()

    def due(self, step: int) -> bool:
        return step % self.settings.epoch == 0 or step == self.settings.steps

    def measure(self, step: int) -> bool:
        """Validate, and keep the network if it is the best so far; what training began with counts.

        Until the first validation has worked, an older run in the folder stays.
        """
        self._look()
        figures = self.validate()
        best = self.monitor.judge(self.state, step, figures) if figures else False
        if step == 0:
            if self.checkpointer.saved is None:
                if self.place.output is not None and self.main:
                    clear(self.place.output)
                self.reporter.open()
            self.state.before = dict(figures or {})
        if figures:
            self.reporter.validated(step, figures)
            self.state.figures |= figures
            self.state.validated_at = step
            if best:
                self.checkpointer.keep_best(self.state)
        if figures or (figures is not None and step):
            shown = ("val_loss", self.task.best, self.monitor.name)
            self.reporter.row(step, figures, shown, self.updates.rate, best)
        return figures is not None

    def keeps(self, step: int) -> bool:
        self._midway = not self.due(step) and self._between(step)
        return self.due(step) or self._midway

    def keep(self) -> None:
        if self._midway:  # of which the figures must not tell
            self.updates.check()
            self.state.partial = self.reporter.partial(self.processes.total)
        else:
            self._look()
        self._midway = False
        self._write()
        self._between.done()

    def tell(self) -> None:
        self.reporter.progress(self.step, self.state.figures)

    def stopping(self) -> bool:
        """Whether a signal ends the run, on which all processes agree at every look, or patience does."""
        if self.monitor.exhausted(self.state):
            return True
        if not self.processes.together:
            return self.signals.received is not None
        if self.step % LOOKS == 0 or self.step == self.settings.steps:
            self._agreed = self.processes.largest(self.signals.received or 0)
            self.signals.received = self._agreed or self.signals.received
        return self._agreed > 0

    def failed(self, error: Exception, where: str) -> None:
        if isinstance(error, NonFinite):
            self._restore()
        elif isinstance(error, DataError) or is_memory(error):
            self._rescue()
        told = explain(error, where, self.device, self.checkpointer.told())
        if told is not None:
            raise told from error

    def _rescue(self) -> None:
        """Save what there is, if it belongs together: the step that failed has changed nothing."""
        self.updates.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        saved = self.checkpointer.saved
        if not self.updates.whole or saved is None or self.step <= saved:
            return
        try:
            self.updates.check()
            self.state.partial = None
            if not self.processes.together:  # the others know nothing of this, and do not join in summing up
                self._look()
        except NonFinite:
            self._restore()
        else:
            self._write()

    # --- figures, files -----------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Read what was summed up since the last look, over all processes."""
        self.updates.check()
        figures = self.reporter.look(self.step, self.updates.rate, self.processes.total)
        self.state.partial = None
        self.state.figures |= figures
        if figures:
            self.state.window = self.reporter.window

    def _write(self) -> None:
        """The state, the network, and now and then the pages."""
        self.reporter.clock.pause()
        self.checkpointer.keep(self.state, self.engine.measured)
        folder = self.place.output if self.main else None
        ends = self.ended or self.signals.received is not None
        if folder is not None and (ends or self.reporter.pages_due()):
            at = self.state.best_at
            self.reporter.draw(folder, self.task.panels, None if at is None else (self.monitor.name, at))
            self._draw_examples(folder / EXAMPLES)
        self.reporter.clock.resume()

    def validate(self) -> dict[str, float] | None:
        """Figures of the validation set, of the averaged network where there is one; None when it was cut short."""
        if self.batches.validation is None:
            return {}
        network = self.checkpointer.network
        meter = self.task.meter()
        self.reporter.clock.pause()
        with torch.no_grad(), evaluating(network):
            for batch in self.batches.validation:
                if batch.count:
                    content = on_device(batch.content, self.device, channels_last=self.channels_last)
                    with self.accelerator.autocast():
                        meter.add(network, content)
                if self.signals.received is not None and not self.processes.together:
                    return None
        self.reporter.clock.resume()
        figures = meter.result(self.processes.total)
        self._meter = meter
        return figures

    def _draw_examples(self, path: Path) -> None:
        """A page of validation pictures, spread over the whole set, and what the network makes of them."""
        source = self._sets.validation
        items = [] if source is None else list(spread(source, _SHOWN))
        if items:
            network = self.checkpointer.network
            content = on_device(self.task.collate(items), self.device, channels_last=self.channels_last)
            with torch.no_grad(), undisturbed(network), evaluating(network), self.accelerator.autocast():
                self.task.draw(network, content, path)

    def report(self) -> FinetuneReport:
        """What the run came to."""
        folder, settings, standing = self.place.output, self.settings, self.state
        names = {"last_file": LAST, "best_file": BEST, "state": STATE, "curves": CURVES, "examples": EXAMPLES}
        names |= {"matrix": CONFUSION}
        places = {} if folder is None else {k: folder / name for k, name in names.items()}
        of = ByClass() if self._meter is None else self._meter.by_class(self._sets.classes or ())
        if folder is not None and self.main:
            write_matrix(folder, of)
        files: dict[str, Any] = {k: place for k, place in places.items() if place.is_file()}
        return FinetuneReport(
            self.step, settings.steps, self.step / settings.epoch, settings.processes, settings.global_batch,
            settings.lr, self.reporter.clock.total(), self.reporter.speed(self.step),
            standing.figures, standing.before, self.monitor.name, standing.best, standing.best_at, **files,
            interrupted=not self.ended, resumed_at=self.reporter.began,
            window=standing.window, validated_at=standing.validated_at,
            validation_images=0 if self._sets.validation is None else len(self._sets.validation),
            task=self.task.name, **vars(of), notes=tuple(self.reporter.notes),
            bad=tuple(str(bad) for bad in self.batches.skipped.found.values()),
            history=self.reporter.history, panels=self.task.panels,
        )  # fmt: skip
