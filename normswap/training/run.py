"""One distillation: two networks, the batches they see, the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..agreement import floating
from ..errors import DataError, TrainingError
from ..surgery import device_and_dtype
from .augmentation import augmented
from .features import Features
from .loop import SMALLER, Loop
from .losses import agreement_of, loss_of
from .optimizer import adamw, one_cycle
from .outputs import outputs_of, run
from .report import Progress
from .settings import PRECISIONS, Settings
from .state import save_state
from .stream import Args, Stream, seed_step


class Run:
    """What a distillation holds while it runs.

    checkpoint, every: the file for its state, and after how many steps it is written again.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        settings: Settings,
        stream: Stream,
        parameters: dict[str, nn.Parameter],
    ) -> None:
        self.model, self.reference, self.settings, self.stream = model, reference, settings, stream
        self._teach, self._learn = outputs_of(reference), outputs_of(model)
        self._kind = device_and_dtype(model)[0].type
        self._narrow = PRECISIONS[settings.precision] if self._kind == "cuda" else None
        self.loop = Loop(
            parameters,
            adamw(model, parameters, settings.weight_decay),
            steps=settings.steps,
            lr=settings.lr,
            max_grad_norm=settings.max_grad_norm,
            scaling=self._narrow == torch.float16,
        )
        self.checkpoint: Path | None = None
        self.every = 1
        self.resumed_at = 0
        self._agreement: float | None = None
        self._features = Features(reference, model) if settings.features else None

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from what another run has reached."""
        self.loop.restore(state)
        self.resumed_at = self.loop.step

    def finish(self, progress: Callable[[Progress], None] | None) -> None:
        """Do the steps that are left. Whatever it raises, the model is then in its last good state."""
        loop, batches = self.loop, self.stream.start(self.loop.step)
        try:
            while loop.step < loop.steps:
                value = loop.advance(lambda step: self._loss(step, batches))
                if loop.step % self.every == 0:
                    self._save()
                if progress is not None:
                    rate = loop.lr * one_cycle(loop.step - 1, loop.steps)
                    progress(Progress(loop.step, loop.steps, value, self._agreement, rate))
        finally:
            batches.close()
            loop.settle()
            if loop.whole:
                self._save()
        if loop.step < loop.steps:
            raise TrainingError("the last step gave weights that are not finite; it was undone", hint=SMALLER)

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
        args = augmented(args, settings.augment)
        watching = nullcontext() if self._features is None else self._features.watching()
        with watching, torch.autocast(self._kind, dtype=self._narrow, enabled=self._narrow is not None):
            with torch.no_grad():
                wanted = run(self._teach, self.reference, args)
            given = run(self._learn, self.model, args)
        _check_finite(args, wanted)
        self._agreement = agreement_of(wanted, given)
        loss = loss_of(wanted, given, settings.temperature, settings.loss)
        inner = None if self._features is None else self._features.loss()
        # Less and less: what the last norms of small groups cannot match would hold back the output.
        return loss if inner is None else loss + settings.features * (1 - step / settings.steps) * inner

    def _save(self) -> None:
        if self.checkpoint is not None:
            save_state(self.checkpoint, vars(self.settings), self.loop.state())


def _check_finite(args: Args, wanted: Any) -> None:
    """Raise DataError where it is the image, or the original network, that is to blame."""
    for what, tree in (("a batch of the data", args), ("the original network's output", wanted)):
        if any(not bool(t.isfinite().all()) for t in floating(tree).values()):
            raise DataError(f"{what} holds NaN or Inf")
