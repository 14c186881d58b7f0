"""The loop: steps, validations, checkpoints. It knows nothing of what is learnt; see `task`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import save
from ..conversion import record_of
from ..errors import DataError, NormswapError, TrainingError
from ..stabilizing import factors_in, rescale
from ..surgery import evaluating, undisturbed
from ..training.stream import seed_step
from .journal import CURVES, EXAMPLES, Journal
from .labelled import Sets
from .optimizing import averaged, build_optimizer, rate_at
from .order import Order, Turns
from .processes import Optimization
from .report import FinetuneReport, Progress
from .samples import Bad, Loaded, Loader, Samples, spread
from .settings import Place, Settings
from .signals import Signals
from .state import BEST, LAST, STATE, clear, restore_run, save_run
from .task import Task, on_device
from .watch import BETWEEN, Clock, NonFinite, Window, memory

LOOKS = 20
"""After so many steps the loop looks at what it has summed up: on a GPU, looking means waiting for it."""
_SHOWN = 6  # pictures of the validation set in examples.png
_BETWEEN_CURVES = 20.0  # seconds: drawing takes about one
_STANDING = ("best", "best_at", "before", "figures", "_pending", "_entry")

SMALLER = "Try a smaller --lr (lr=), --clip-grad 1 (clip_grad=1.0), or --precision fp32."


@dataclass(frozen=True)
class Job:
    """What a run is about, beside the network: sets are its training and validation data."""

    task: Task
    settings: Settings
    place: Place
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
        self.accelerator, self.progress = accelerator, progress
        self._flags = flags
        settings, place = self.settings, self.place
        self.main: bool = accelerator.is_main_process
        self.folder: Path | None = place.output
        self.device: torch.device = accelerator.device
        self.channels_last = bool(place.channels_last)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        self.average = averaged(model, settings.ema) if settings.ema else None
        optimizer = build_optimizer(model, parameters, settings)
        self.optimization = Optimization(accelerator, model, optimizer, settings.clip_grad)
        self.forward = torch.compile(self.optimization.model) if place.compile else self.optimization.model
        self._sets = job.sets
        self._orders(job.sets.train, job.sets.validation)
        self.step = self.resumed_at = 0
        self.best: float | None = None
        self.best_at: int | None = None
        self.before: dict[str, float] = {}
        self.figures: dict[str, float] = {}
        self.bad: dict[str, Bad] = {}
        self.notes: list[str] = []
        self._saved: int | None = None
        self._copy: dict[str, Any] = {}
        self._pending = False
        self._entry: dict[str, Any] | None = None
        self._clock = Clock()
        self._window = Window()

    def _orders(self, train: Any, validation: Any) -> None:
        settings, place, accelerator = self.settings, self.place, self.accelerator
        shared = {"processes": accelerator.num_processes, "rank": accelerator.process_index}
        self.order = Order(settings.samples, settings.batch_size, settings.seed, settings.accumulate, **shared)
        workers, pin = place.workers or 0, self.device.type == "cuda"
        collate = self.task.collate
        self._train = Loader(Samples(train, collate, seed=settings.seed, replace=True), self.order, workers, pin=pin)
        self._validation: Loader | None = None
        if validation is not None:
            turns = Turns(len(validation), max(settings.batch_size, self.task.at_once), **shared)
            samples = Samples(validation, collate, seed=settings.seed, replace=False)
            self._validation = Loader(samples, turns, workers, pin=pin)

    # --- the run ------------------------------------------------------------------------------------------------

    def run(self, *, resume: bool) -> FinetuneReport:
        """Do the steps that are left. Raises NormswapError subclasses, after which the last checkpoint is whole."""
        settings = self.settings
        if resume and self.folder is not None:
            self._restore(self.folder / STATE)
        elif self.folder is not None and self.main:
            clear(self.folder)
        self.resumed_at = self.step
        self.journal = Journal(
            self.folder if self.main else None, step=self.step, tensorboard=self.place.tensorboard and self.main
        )
        self._clock.start()
        try:
            with Signals() as self.signals:
                if not resume or (self._pending and self.step == 0):
                    self.before = self.validate() or {}
                    self.figures = dict(self.before)
                    self._compare(self.before)
                    self._pending = self.signals.received is not None
                    self._keep()
                elif self._pending:
                    self._guarded(self._evaluate)
                    self._keep()
                self._steps()
        finally:
            self.journal.close()
        if self.step == settings.steps and self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        return self.report()

    @property
    def stopped_by(self) -> int | None:
        """The signal that ended the run early, None for a run that is complete."""
        return self.signals.received if self.step < self.settings.steps or self._pending else None

    def _steps(self) -> None:
        settings = self.settings
        length = settings.epoch
        while self.step < settings.steps and self._stopping() is None:
            epoch, first = divmod(self.step, length)
            self.order.start(epoch, first)
            batches = iter(self._train)
            self.model.train()
            while self.step < min((epoch + 1) * length, settings.steps):
                self._guarded(lambda batches=batches: self._advance(batches))  # type: ignore[misc]
                if self._stopping() is not None:
                    self._look()
                    break
            ended = self.step == settings.steps or self.step % length == 0
            if ended:
                self._look()
                self._guarded(self._evaluate)
            if ended or self._stopping() is not None:
                self._keep()

    def _advance(self, batches: Iterator[Loaded]) -> None:
        """One optimizer step."""
        settings = self.settings
        loaded = [self._noted(next(batches)) for _ in range(settings.accumulate)]
        seed_step(settings.seed * 0x10001 + self.accelerator.process_index, self.step)
        sums: list[dict[str, Tensor]] = []

        def loss_of(batch: Loaded) -> Tensor:
            content = on_device(batch.content, self.device, channels_last=self.channels_last)
            outcome = self.task.outcome(self.forward, content)
            if self.device.type == "cpu" and not math.isfinite(value := float(outcome.loss.detach())):
                raise NonFinite(self.step + 1, value)  # before anything has changed
            sums.append(dict(outcome.sums))
            return outcome.loss

        loss = self.optimization.step([partial(loss_of, batch) for batch in loaded], rate_at(self.step, settings))
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        self._window.add(self.step, loss, sums, sum(batch.count for batch in loaded))
        if self.step % LOOKS == 0 or self.step == settings.steps:
            self._look()
        self._tell()

    def _look(self) -> None:
        """Read what was summed up since the last look, over all processes; write it down."""
        window = self._window
        if not window.steps:
            return
        window.check()
        figures = window.figures(self._total)
        self.figures = {**self.figures, **figures}
        rate = rate_at(self.step - 1, self.settings)
        speed = self._clock.lap(window.samples * self.accelerator.num_processes)
        if self.main:
            self.journal.write({**self._at(), **figures, "lr": rate, "samples_per_second": round(speed, 2)})
        self._window = Window()

    def validate(self) -> dict[str, float] | None:
        """Figures of the validation set, of the averaged network where there is one; None when it was cut short."""
        if self._validation is None:
            return {}
        network = self.model if self.average is None else self.average.module
        meter = self.task.meter()
        self._clock.pause()
        with torch.no_grad(), evaluating(network):
            for batch in self._validation:
                self._noted(batch)
                if batch.count:
                    content = on_device(batch.content, self.device, channels_last=self.channels_last)
                    with self.accelerator.autocast():
                        meter.add(network, content)
                if self.signals.received is not None and not self._together:
                    return None
        self._clock.resume()
        figures = meter.result(self._total)
        if self.main:
            self.journal.write({**self._at(), **figures})
        if self.progress is not None and self.main:
            self.progress(self._progress(figures, validation=True))
        return figures

    def _evaluate(self) -> None:
        """Validate, and keep the network if it is the best so far."""
        figures = self.validate()
        self._pending = figures is None
        if figures is None:
            return
        self.figures = {**self.figures, **figures}
        self._compare(figures)

    def _compare(self, figures: dict[str, float]) -> None:
        """Keep the network if it is the best so far; what training began with counts."""
        value = figures.get(self.task.best)
        if value is not None and (self.best is None or value > self.best):
            self.best, self.best_at = value, self.step
            self._save_network(BEST)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Write the state of the run, and the network as it is."""
        self._clock.pause()
        self._write()
        self._clock.resume()

    def _write(self) -> None:
        self._saved = self.step
        if self.folder is None:
            self._copy = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        if self.folder is None or not self.main:
            return
        standing = {name: getattr(self, name) for name in _STANDING} | {"factors": dict(factors_in(self.model))}
        save_run(
            self.folder / STATE, asdict(self.settings), self.step, self.model, self.optimization.optimizer,
            self.average, self.optimization.scaler, standing,
        )  # fmt: skip
        self._save_network(LAST)
        if self.step == self.settings.steps or self.signals.received or self._clock.since_drawn() > _BETWEEN_CURVES:
            self.journal.draw(self.task.panels, self.folder.name)
            self._draw_examples(self.folder / EXAMPLES)
            self._clock.drawn()

    def _draw_examples(self, path: Path) -> None:
        """A page of validation pictures, spread over the whole set, and what the network makes of them."""
        source = self._sets.validation
        if source is None:
            return
        network = self.model if self.average is None else self.average.module
        items = list(spread(source, _SHOWN))
        if items:
            content = on_device(self.task.collate(items), self.device, channels_last=self.channels_last)
            with torch.no_grad(), undisturbed(network), evaluating(network), self.accelerator.autocast():
                self.task.draw(network, content, path)

    def _save_network(self, name: str) -> None:
        if self.folder is None or not self.main:
            return
        network = self.model if self.average is None else self.average.module
        self._remember(network)
        training = {n: p.requires_grad for n, p in network.named_parameters()}
        _set_flags(network, self._flags)
        try:
            save(network, self.folder / name)
        finally:
            _set_flags(network, training)

    def _remember(self, network: nn.Module) -> None:
        """Note in the network's history what was done so far, in place of what an earlier checkpoint noted."""
        record, settings = record_of(network), self.settings
        if record is None or self.step == 0:
            return
        entry = {"action": "finetune", "steps": self.step, "planned": settings.steps, "train": settings.train}
        entry |= {"lr": settings.lr, "optimizer": settings.optimizer, "global_batch": settings.global_batch}
        entry |= {"seed": settings.seed, "figures": dict(self.figures)}
        if self._entry is not None and record.history[-1:] == [self._entry]:
            record.history.pop()
        record.history.append(entry)
        self._entry = entry

    def _restore(self, path: Path) -> None:
        self.step, standing = restore_run(
            path, asdict(self.settings), self.model, self.optimization.optimizer, self.average, self.optimization.scaler
        )
        for name in _STANDING:
            setattr(self, name, standing[name])
        for network in (self.model, *([] if self.average is None else [self.average.module])):
            rescale(network, dict(factors_in(network)), back=True, values=False)
            rescale(network, standing["factors"], values=False)
        self._saved = self.step

    # --- trouble ------------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except NonFinite as error:
            self._back()
            raise TrainingError(
                f"the loss is {error.value} at step {error.step}; {self._safe()}", hint=SMALLER
            ) from None
        except DataError as error:
            self._rescue()
            raise DataError(f"{error.message}; {self._safe()}", hint=error.hint) from error
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_memory(error):
                raise
            self._rescue()
            raise TrainingError(
                f"step {self.step + 1} does not fit into the memory of {self.device}; {self._safe()}",
                hint="Try a smaller --batch-size (batch_size=) with a larger --accumulate (accumulate=), "
                "--precision bf16, or smaller images (--size).",
            ) from error
        except NormswapError:
            raise
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrainingError(
                "BatchNorm cannot train on a single value per channel, as it gets here",
                hint="A larger --batch-size, frozen statistics (--freeze-stats), or another norm (--to gn).",
            ) from error

    def _rescue(self) -> None:
        """Save what there is, if it belongs together: the step that failed has changed nothing."""
        self.optimization.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self.optimization.updating and self._saved is not None and self.step > self._saved:
            self._look()
            self._keep()

    def _safe(self) -> str:
        if self._saved is None:
            return "nothing has changed yet"
        if self.folder is None:
            return (
                "the network is as it was before" if self._saved == 0 else f"the network is that of step {self._saved}"
            )
        return f"the last good checkpoint is {self.folder / STATE}, of step {self._saved}"

    def _back(self) -> None:
        """Leave the caller's network as the last checkpoint has it, not full of NaN."""
        if self.folder is None:
            self.model.load_state_dict(self._copy)
        elif (self.folder / STATE).is_file():
            self._restore(self.folder / STATE)

    def _noted(self, batch: Loaded) -> Loaded:
        for bad in batch.bad:
            if bad.name not in self.bad:
                self.bad[bad.name] = bad
        if len(self.bad) > self.place.max_bad:
            names = "\n".join(f"  {bad}" for bad in list(self.bad.values())[:20])
            raise DataError(
                f"{len(self.bad)} image{'s' * (len(self.bad) != 1)} cannot be read:\n{names}\n",
                hint=f"Remove or replace them, or allow more than --max-bad {self.place.max_bad} (max_bad=).",
            )
        return batch

    # --- many processes, progress ---------------------------------------------------------------------------------

    @property
    def _together(self) -> bool:
        return bool(self.accelerator.num_processes > 1)

    def _stopping(self) -> int | None:
        """The signal that ends the run, if one came; all processes agree on it, at every look."""
        if not self._together:
            return self.signals.received
        if self.step % LOOKS and self.step != self.settings.steps:
            return None
        agreed = self._total(torch.tensor(float(self.signals.received or 0)))
        if agreed and self.signals.received is None:
            self.signals.received = int(agreed)
        return self.signals.received

    def _total(self, value: Tensor) -> Tensor:
        if not self._together:
            return value
        value = value.to(self.device, torch.float32 if self.device.type == "mps" else torch.float64)
        found: Tensor = self.accelerator.reduce(value, "sum")
        return found.cpu()

    def _at(self) -> dict[str, Any]:
        return {"step": self.step, "epoch": round(self.step / self.settings.epoch, 4)}

    def _tell(self) -> None:
        if self.progress is not None and self.main and self._clock.since_told() > BETWEEN:
            self.progress(self._progress(self._window.now() or self.figures))

    def _progress(self, figures: dict[str, float], *, validation: bool = False) -> Progress:
        left = self._clock.left(self.step - self.resumed_at, self.settings.steps - self.step)
        speed = self._clock.speed(self.settings.global_batch, self.step - self.resumed_at)
        return Progress(
            self.step, self.settings.steps, self.step / self.settings.epoch, figures, speed, memory(self.device), left,
            validation,
        )  # fmt: skip

    def report(self) -> FinetuneReport:
        """What the run came to."""
        written = {
            name: path if self.folder is not None and (path := self.folder / file).is_file() else None
            for name, file in (
                ("last_file", LAST),
                ("best_file", BEST),
                ("state", STATE),
                ("curves", CURVES),
                ("examples", EXAMPLES),
            )
        }
        seconds = self._clock.total()
        settings = self.settings
        return FinetuneReport(
            self.step, settings.steps, self.step / settings.epoch, settings.processes, settings.global_batch,
            settings.lr, seconds, self._clock.speed(settings.global_batch, self.step - self.resumed_at),
            self.figures, self.before, self.task.best, self.best, self.best_at, **written,
            interrupted=self.step < settings.steps, resumed_at=self.resumed_at,
            bad=tuple(str(bad) for bad in self.bad.values()), notes=tuple(self.notes),
        )  # fmt: skip


def _set_flags(model: nn.Module, flags: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])


def _is_memory(error: BaseException) -> bool:
    """Whether memory ran out; on a CPU torch says so in a RuntimeError."""
    text = str(error)
    return not isinstance(error, RuntimeError) or "out of memory" in text or "can't allocate memory" in text
