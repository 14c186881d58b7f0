"""The loop: steps, validations, checkpoints. It knows nothing of what is learnt; see `task`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DataError
from ...modules.restore import evaluating, undisturbed
from ...training.optimizer import build_optimizer
from ...training.seeding import seed_step
from ...training.signals import Signals
from ..datasets.loader import Loaded, Loader, Samples, Skipped, spread
from ..datasets.sampler import ResumableBatchSampler, ValidationSampler
from ..datasets.splits import Sets
from ..output.layout import BEST, CURVES, EXAMPLES, LAST, STATE, clear
from ..output.report import FinetuneReport, Progress
from ..settings import RunOptions, Settings
from ..tasks.base import Task, on_device
from .accelerator import Optimization
from .checkpointer import Checkpointer, RunState
from .failures import NonFinite, explain, is_memory
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
        self.accelerator = accelerator
        settings, place = self.settings, self.place
        self.main: bool = accelerator.is_main_process
        self.device: torch.device = accelerator.device
        self.channels_last = bool(place.channels_last)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        self.average = averaged(model, settings.ema) if settings.ema else None
        optimizer = build_optimizer(model, parameters, settings.optimizer, settings.weight_decay)
        self.optimization = Optimization(accelerator, model, optimizer, settings.clip_grad)
        self.forward = self.optimization.model
        self.checkpointer = Checkpointer(
            place.output, settings, model, self.average, self.optimization, flags, main=self.main
        )  # fmt: skip
        self._sets = job.sets
        self.skipped = Skipped(place.max_bad)
        self._orders(job.sets.train, job.sets.validation)
        self.state = RunState()
        self.reporter = RunReporter(settings, place, self.device, main=self.main, tell=progress)

    def _orders(self, train: Any, validation: Any) -> None:
        settings, place, accelerator = self.settings, self.place, self.accelerator
        shared = {"processes": accelerator.num_processes, "rank": accelerator.process_index}
        self.order = ResumableBatchSampler(
            settings.samples, settings.batch_size, settings.seed, settings.accumulate, **shared
        )
        workers, pin = place.workers or 0, self.device.type == "cuda"
        collate = self.task.collate
        samples = Samples(train, collate, seed=settings.seed, replace=True)
        self._train = Loader(samples, self.order, workers, self.skipped, pin=pin)
        self._validation: Loader | None = None
        if validation is not None:
            turns = ValidationSampler(len(validation), max(settings.batch_size, self.task.at_once), **shared)
            samples = Samples(validation, collate, seed=settings.seed, replace=False)
            self._validation = Loader(samples, turns, workers, self.skipped, pin=pin)

    # --- the run ------------------------------------------------------------------------------------------------

    def run(self, *, resume: bool) -> FinetuneReport:
        """Do the steps that are left. Raises NormswapError subclasses, after which the last checkpoint is whole."""
        if resume:
            self.state = self.checkpointer.restore() or self.state
        self.reporter.begin(self.step)
        if resume:
            self.reporter.open()
        try:
            with self._compiled(), Signals() as self.signals:
                if not resume or (self.state.pending and self.step == 0):
                    self._guarded(self._begin, "validation")
                elif self.state.pending:
                    self._guarded(self._evaluate, "validation")
                    self._keep()
                self._steps()
        finally:
            self.reporter.end()
        if self.step == self.settings.steps and self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        return self.report()

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.state.step

    @property
    def stopped_by(self) -> int | None:
        """The signal that ended the run early, None for a run that is complete."""
        return self.signals.received if self.step < self.settings.steps or self.state.pending else None

    def _begin(self) -> None:
        """Validate and keep what training begins with; until that has worked, an older run in the folder stays."""
        figures = self.validate() or {}
        if self.checkpointer.saved is None:
            if self.place.output is not None and self.main:
                clear(self.place.output)
            self.reporter.open()
        if figures:
            self.reporter.validated(self.step, figures)
            self.state.validated_at = 0
        self.state.before, self.state.figures = figures, dict(figures)
        self._compare(figures)
        self.state.pending = self.signals.received is not None
        self._keep()

    def _steps(self) -> None:
        settings = self.settings
        length = settings.epoch
        while self.step < settings.steps and self._stopping() is None:
            epoch, first = divmod(self.step, length)
            self.order.start(epoch, first)
            batches = iter(self._train)
            self.model.train()
            while self.step < min((epoch + 1) * length, settings.steps):
                self._guarded(partial(self._advance, batches))
                if self._stopping() is not None:
                    break
            self._guarded(self._look)
            ended = self.step == settings.steps or self.step % length == 0
            if ended:
                self._guarded(self._evaluate, "validation")
            if ended or self._stopping() is not None:
                self._keep()

    def _advance(self, batches: Iterator[Loaded]) -> None:
        """One optimizer step."""
        settings = self.settings
        loaded = [next(batches) for _ in range(settings.accumulate)]
        seed_step(settings.seed * 0x10001 + self.accelerator.process_index, self.step)
        sums: list[dict[str, Tensor]] = []

        def loss_of(batch: Loaded) -> Tensor:
            content = on_device(batch.content, self.device, channels_last=self.channels_last)
            outcome = self.task.outcome(self.forward, content)
            if self.device.type == "cpu" and not math.isfinite(value := float(outcome.loss.detach())):
                raise NonFinite(self.step + 1, value)  # before anything has changed
            sums.append(dict(outcome.sums))
            return outcome.loss

        loss = self.optimization.step([partial(loss_of, batch) for batch in loaded], settings.schedule.at(self.step))
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.state.step += 1
        self.reporter.step(self.step, loss, sums, sum(batch.count for batch in loaded))
        if self.step % LOOKS == 0 or self.step == settings.steps:
            self._look()
        self.reporter.progress(self.step, self.state.figures)

    def _look(self) -> None:
        """Read what was summed up since the last look, over all processes."""
        figures = self.reporter.look(self.step, self.settings.schedule.at(self.step - 1), self._total)
        self.state.figures |= figures
        if figures:
            self.state.window = self.reporter.window

    def validate(self) -> dict[str, float] | None:
        """Figures of the validation set, of the averaged network where there is one; None when it was cut short."""
        if self._validation is None:
            return {}
        network = self.checkpointer.network
        meter = self.task.meter()
        self.reporter.clock.pause()
        with torch.no_grad(), evaluating(network):
            for batch in self._validation:
                if batch.count:
                    content = on_device(batch.content, self.device, channels_last=self.channels_last)
                    with self.accelerator.autocast():
                        meter.add(network, content)
                if self.signals.received is not None and not self._together:
                    return None
        self.reporter.clock.resume()
        return meter.result(self._total)

    def _evaluate(self) -> None:
        """Validate, and keep the network if it is the best so far."""
        figures = self.validate()
        self.state.pending = figures is None
        if figures:
            self.reporter.validated(self.step, figures)
            self.state.figures |= figures
            self.state.validated_at = self.step
            self._compare(figures)

    def _compare(self, figures: dict[str, float]) -> None:
        """Keep the network if it is the best so far; what training began with counts."""
        standing, value, loss = self.state, figures.get(self.task.best), figures.get("val_loss")
        if value is not None and standing.better(value, loss):
            standing.best, standing.best_at, standing.best_loss = value, self.step, loss
            self.checkpointer.keep_best(standing)

    def _keep(self) -> None:
        """Write the state of the run, the network as it is, and now and then the pages."""
        self.reporter.clock.pause()
        self.checkpointer.keep(self.state)
        folder = self.place.output if self.main else None
        ends = self.step == self.settings.steps or self.signals.received is not None
        if folder is not None and (ends or self.reporter.pages_due()):
            self.reporter.draw(folder, self.task.panels)
            self._draw_examples(folder / EXAMPLES)
        self.reporter.clock.resume()

    def _draw_examples(self, path: Path) -> None:
        """A page of validation pictures, spread over the whole set, and what the network makes of them."""
        source = self._sets.validation
        items = [] if source is None else list(spread(source, _SHOWN))
        if items:
            network = self.checkpointer.network
            content = on_device(self.task.collate(items), self.device, channels_last=self.channels_last)
            with torch.no_grad(), undisturbed(network), evaluating(network), self.accelerator.autocast():
                self.task.draw(network, content, path)

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """If asked for, compile what the task says of the network, for the time of the run."""
        if not self.place.compile:
            yield
            return
        part = None if self.task.compiled_part is None else getattr(self.model, self.task.compiled_part, None)
        if not isinstance(part, nn.Module):
            self.forward = torch.compile(self.forward)
            yield
            return
        before = part._compiled_call_impl
        part.compile()
        try:
            yield
        finally:
            part._compiled_call_impl = before

    # --- trouble ------------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], None], name: str = "") -> None:
        """Do it; when it fails, leave the network whole, and say what happened and what is left."""
        try:
            work()
        except Exception as error:
            if isinstance(error, NonFinite):
                self._back()
            elif isinstance(error, DataError) or is_memory(error):
                self._rescue()
            told = explain(error, name or f"step {self.step + 1}", self.device, self.checkpointer.told())
            if told is None:
                raise
            raise told from error

    def _rescue(self) -> None:
        """Save what there is, if it belongs together: the step that failed has changed nothing."""
        self.optimization.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        saved = self.checkpointer.saved
        if self.optimization.updating or saved is None or self.step <= saved:
            return
        try:
            if self._together:  # the others know nothing of this, and do not join in summing up
                self.reporter.check()
            else:
                self._look()
        except NonFinite:
            self._back()
        else:
            self._keep()

    def _back(self) -> None:
        """Leave the caller's network as the last checkpoint has it, not full of NaN."""
        if self.checkpointer.saved is not None:
            self.state = self.checkpointer.restore() or self.state

    # --- many processes ---------------------------------------------------------------------------------

    @property
    def _together(self) -> bool:
        return bool(self.accelerator.num_processes > 1)

    def _stopping(self) -> int | None:
        """The signal that ends the run, if one came; all processes agree on it, at every look."""
        if not self._together:
            return self.signals.received
        if self.step % LOOKS and self.step != self.settings.steps:
            return None
        own = torch.tensor([self.signals.received or 0], device=self.device)
        agreed = int(self.accelerator.gather(own).max()) or None
        if agreed is not None:
            self.signals.received = agreed
        return agreed

    def _total(self, value: Tensor) -> Tensor:
        if not self._together:
            return value
        value = value.to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)
        found: Tensor = self.accelerator.reduce(value, "sum")
        return found.cpu()

    def report(self) -> FinetuneReport:
        """What the run came to."""
        folder, settings, standing = self.place.output, self.settings, self.state
        names = {"last_file": LAST, "best_file": BEST, "state": STATE, "curves": CURVES, "examples": EXAMPLES}
        places = {} if folder is None else {k: folder / name for k, name in names.items()}
        files: dict[str, Any] = {k: place for k, place in places.items() if place.is_file()}
        return FinetuneReport(
            self.step, settings.steps, self.step / settings.epoch, settings.processes, settings.global_batch,
            settings.lr, self.reporter.clock.total(), self.reporter.speed(self.step),
            standing.figures, standing.before, self.task.best, standing.best, standing.best_at, **files,
            interrupted=self.step < settings.steps, resumed_at=self.reporter.began,
            window=standing.window, validated_at=standing.validated_at,
            validation_images=0 if self._sets.validation is None else len(self._sets.validation),
            bad=tuple(str(bad) for bad in self.skipped.found.values()),
        )  # fmt: skip
