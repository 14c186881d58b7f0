"""One distillation: two networks, the batches they see, the steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Fix, Text, TrainingError
from ..modules.tree import device_and_dtype
from ..training.engine import Engine
from ..training.optimizer import relative_adamw
from ..training.run_state import save_state
from ..training.seeding import seed_step
from ..training.snapshot import Snapshot
from ..training.updates import NonFinite, Updates
from .augmentation import augmented
from .judging import LOOKS, Judge
from .report import Progress
from .settings import PRECISIONS, Settings
from .stream import Compared, Stream
from .target import Target

SMALLER = Text("Try a smaller learning rate, ", Fix("lr"), ", or ", Fix("precision", "fp32"), ".")


_POINTS = 100


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
        self.settings, self.stream = settings, stream
        self._kind = device_and_dtype(model)[0].type
        self._narrow = PRECISIONS[settings.precision] if self._kind == "cuda" else None
        scaler = torch.amp.GradScaler(self._kind, enabled=self._narrow == torch.float16)
        self.updates = Updates(
            relative_adamw(model, parameters, settings.weight_decay), settings.schedule, settings.max_grad_norm,
            scaler=scaler, good=Snapshot(lambda: parameters),
        )  # fmt: skip
        self.engine = Engine(self, self.updates, settings.steps)
        self.checkpoint: Path | None = None
        self.every = 1
        self.resumed_at = 0
        self.parameters, self._values = parameters, list[float]()
        self._agreement: float | None = None
        self.target = Target(reference, model, settings)
        self.judge = Judge(self.target, compared, parameters)
        self.judge.begin()

    @torch.no_grad()
    def resume(self, state: dict[str, Any]) -> None:
        """Go on from what another run has reached."""
        self.judge.resume(**state["best"])
        for name, p in self.parameters.items():
            p.copy_(state["parameters"][name])
        self.updates.restore(state)
        self.engine.measured, self._values = state["looked"], list(state["losses"])
        self.resumed_at = self.step

    def finish(self, progress: Callable[[Progress], None] | None) -> None:
        """Do the steps that are left. Whatever it raises, the model then has the nearest state that was measured."""
        self._progress, self._batches = progress, self.stream.start(self.step)
        try:
            try:
                self.engine.run()
            finally:  # in its last good state, and saved if all of it belongs together
                self._batches.close()
                self.updates.settle()
                if self.updates.whole:
                    self.keep()
            if self.step < self.settings.steps:
                raise TrainingError("the last step gave weights that are not finite; it was undone", hint=SMALLER)
        except KeyboardInterrupt:
            self.judge.look(self.step)  # not in the state: a run without interruption does not look here
            raise
        finally:
            self.judge.restore()

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.updates.step

    # --- what a `Lesson` has to have -----------------------------------------------------------------------------

    def passes(self, step: int) -> list[Callable[[], Tensor]]:
        return [partial(self._loss, step)]

    def stepped(self, loss: Tensor) -> None:
        self._values.append(float(loss))

    def due(self, step: int) -> bool:
        """Measured is now and then: at steps that depend on the number of all steps alone."""
        steps = self.settings.steps
        return step > 0 and (step % -(-steps // LOOKS) == 0 or step == steps)

    def measure(self, step: int) -> bool:
        self.judge.look(step)
        return True

    def keeps(self, step: int) -> bool:
        return step % self.every == 0

    def keep(self) -> None:
        if self.checkpoint is not None:
            state = {**self.updates.state(), "losses": self._values[: self.step], "looked": self.engine.measured}
            state["parameters"] = {name: p.detach().cpu() for name, p in self.parameters.items()}
            save_state(self.checkpoint, vars(self.settings), {**state, "best": self.judge.state()})

    def tell(self) -> None:
        if self._progress is not None:
            loss, rate = self._values[-1], self.updates.rate
            self._progress(Progress(self.step, self.settings.steps, loss, self._agreement, rate))

    def stopping(self) -> bool:
        """An interrupt breaks a step: one of a large teacher may take long."""
        return False

    def failed(self, error: Exception, where: str) -> None:
        """A loss that is not finite tells of weights that the last update ruined."""
        if isinstance(error, NonFinite):
            self.updates.back()
            raise TrainingError(f"{error}; the network is as it was before", hint=SMALLER) from error

    @property
    def losses(self) -> tuple[float | None, float | None]:
        """Means over the first and the last tenth of the steps done."""
        done = self._values[: self.step]
        some = max(1, len(done) // 10)
        return (sum(done[:some]) / some, sum(done[-some:]) / some) if done else (None, None)

    @property
    def curve(self) -> tuple[tuple[int, float], ...]:
        """(step, loss), means over a hundredth of the steps each."""
        done = self._values[: self.step]
        size = max(1, -(-len(done) // _POINTS))
        parts = (done[start : start + size] for start in range(0, len(done), size))
        return tuple((min((i + 1) * size, len(done)), sum(part) / len(part)) for i, part in enumerate(parts))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it ran."""
        if self.settings.precision != "fp32" and self._narrow is None:
            return (f"{self.settings.precision} is for CUDA; computed in float32 on {self._kind}", *self.target.notes)
        return self.target.notes

    def _loss(self, step: int) -> Tensor:
        settings = self.settings
        seed_step(settings.seed, step)
        args = next(self._batches)
        seed_step(settings.seed, step)
        args = augmented(args, settings.augment)
        weight = settings.features * (1 - step / settings.steps)
        with torch.autocast(self._kind, dtype=self._narrow, enabled=self._narrow is not None):
            answers = self.target.run(args, inside=settings.features > 0)
        self._agreement = self.target.agreement(answers)
        # Less and less: what the last norms of small groups cannot match would hold back the output.
        return self.target.loss(answers, weight)
