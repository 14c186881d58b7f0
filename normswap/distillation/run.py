"""One distillation: two networks, the batches they see, the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, TrainingError
from ..modules.tree import device_and_dtype
from ..training.losses import agreement_of, loss_of
from ..training.optimizer import relative_adamw
from ..training.run_state import save_state
from ..training.seeding import seed_step
from .augmentation import augmented
from .feature_loss import Features
from .judging import LOOKS, Judge, check_finite
from .loop import SMALLER, Loop
from .outputs import outputs_of, run
from .report import Progress
from .settings import PRECISIONS, Settings
from .stream import Args, Compared, Stream


class DistillationRun:
    """What a distillation holds while it runs.

    judge: measures it on images kept apart, and holds the state that is given back. checkpoint, every: the file for
    its state, and after how many steps it is written again.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        settings: Settings,
        stream: Stream,
        parameters: dict[str, nn.Parameter],
        compared: Compared,
    ) -> None:
        self.model, self.reference, self.settings, self.stream = model, reference, settings, stream
        self._teach, self._learn = outputs_of(reference), outputs_of(model)
        self._kind = device_and_dtype(model)[0].type
        self._narrow = PRECISIONS[settings.precision] if self._kind == "cuda" else None
        self.loop = Loop(
            parameters,
            relative_adamw(model, parameters, settings.weight_decay),
            steps=settings.steps,
            schedule=settings.schedule,
            max_grad_norm=settings.max_grad_norm,
            scaling=self._narrow == torch.float16,
        )
        self.checkpoint: Path | None = None
        self.every = 1
        self.resumed_at = 0
        self._agreement: float | None = None
        self._features = Features(reference, model) if settings.features else None
        self.judge = Judge(model, reference, settings, compared, parameters)
        self.judge.begin()
        self._looked = 0
        self._stopped = False

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from what another run has reached. Raises CheckpointError for a state without the nearest."""
        if "best" not in state:
            raise CheckpointError(
                "this training state was written by an older normswap", hint="Begin anew, from the last network saved."
            )
        self.judge.resume(**state["best"])
        self._looked = state["looked"]
        self.loop.restore(state)
        self.resumed_at = self.loop.step

    def finish(self, progress: Callable[[Progress], None] | None) -> None:
        """Do the steps that are left. Whatever it raises, the model then has the nearest state that was measured."""
        loop, batches = self.loop, self.stream.start(self.loop.step)
        try:
            self._look()  # if the run that this one goes on with was stopped just before
            while loop.step < loop.steps:
                value = loop.advance(lambda step: self._loss(step, batches))
                self._look()
                if loop.step % self.every == 0:
                    self._save()
                if progress is not None:
                    rate = loop.schedule.at(loop.step - 1)
                    progress(Progress(loop.step, loop.steps, value, self._agreement, rate))
            loop.settle()
            if loop.step < loop.steps:
                raise TrainingError("the last step gave weights that are not finite; it was undone", hint=SMALLER)
        except KeyboardInterrupt:
            self._stop()
            self.judge.look(loop.step)  # not in the state: a run without interruption does not look here
            raise
        finally:
            batches.close()
            self._stop()
            self.judge.restore()

    def _stop(self) -> None:
        """Leave the network in its last good state, and save it if all of it belongs together. Once."""
        if self._stopped:
            return
        self._stopped = True
        self.loop.settle()
        if self.loop.whole:
            self._save()

    def _look(self) -> None:
        """Measure the network now and then: at steps that depend on the number of all steps alone."""
        step, steps = self.loop.step, self.loop.steps
        if step != self._looked and (step % -(-steps // LOOKS) == 0 or step == steps):
            self.judge.look(step)
            self._looked = step

    @property
    def losses(self) -> tuple[float | None, float | None]:
        """Means over the first and the last tenth of the steps done."""
        done = self.loop.losses
        some = max(1, len(done) // 10)
        return (sum(done[:some]) / some, sum(done[-some:]) / some) if done else (None, None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it ran."""
        if self.settings.precision != "fp32" and self._narrow is None:
            return (f"{self.settings.precision} is for CUDA; computed in float32 on {self._kind}",)
        return ()

    def _loss(self, step: int, batches: Iterator[Args]) -> Tensor:
        settings = self.settings
        seed_step(settings.seed, step)
        args = next(batches)
        seed_step(settings.seed, step)
        if settings.augment:
            args = augmented(args)
        watching = nullcontext() if self._features is None else self._features.watching()
        with watching, torch.autocast(self._kind, dtype=self._narrow, enabled=self._narrow is not None):
            with torch.no_grad():
                wanted = run(self._teach, self.reference, args)
            given = run(self._learn, self.model, args)
        check_finite(args, wanted)
        self._agreement = agreement_of(wanted, given)
        loss = loss_of(wanted, given, settings.temperature, settings.loss)
        inner = None if self._features is None else self._features.loss()
        # Less and less: what the last norms of small groups cannot match would hold back the output.
        return loss if inner is None else loss + settings.features * (1 - step / settings.steps) * inner

    def _save(self) -> None:
        if self.checkpoint is not None:
            state = {**self.loop.state(), "best": self.judge.state(), "looked": self._looked}
            save_state(self.checkpoint, vars(self.settings), state)
