"""Gradients and updates: the one place where training changes a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import TrainingError
from .optimizer import set_rate
from .schedule import Schedule
from .snapshot import Snapshot

_SKIPS = 20
"""So many steps in a row whose float16 gradients overflow end the run: lowering the loss scale does not help then."""


class NonFinite(Exception):
    """A loss or a gradient that is NaN or infinite, and the step it came from."""

    def __init__(self, what: str, step: int, value: float) -> None:
        super().__init__(f"the {what} is {value} at step {step}")
        self.step = step


class Updates:
    """Steps of an optimizer; nothing that is not finite becomes a weight.

    step: how many are done. schedule: of the learning rate. clip: limit of the gradient's norm, None for none. scaler:
    for float16 gradients. forward: the network as it is called, which may sum gradients over processes. good: keeps the
    state before each update, for `back`. prompt: look at every loss and gradient before the update; otherwise `check`
    does so afterwards, since on a GPU looking means waiting for it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        clip: float | None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        forward: Any = None,
        good: Snapshot | None = None,
        prompt: bool = True,
    ) -> None:
        self.optimizer, self.schedule, self._clip = optimizer, schedule, clip
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(self._parameters[0].device.type, enabled=False) if scaler is None else scaler
        self._forward, self._good, self._prompt = forward, good, prompt
        self.step = self._skipped = 0
        self._updating = self._rewound = False
        self._unread: list[tuple[str, int, Tensor]] = []
        self._take()

    def advance(self, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
        """One update with the mean gradient of several losses, computed one after the other. Returns their mean.

        Raises NonFinite, with the network as it was, and TrainingError where the losses depend on nothing that trains.
        """
        parts = []
        for i, loss_of in enumerate(losses):
            with self._unsynced(i < len(losses) - 1):
                loss = loss_of()
                self._watch("loss", loss)
                loss = loss / len(losses)
                self.scaler.scale(loss).backward()
            parts.append(loss.detach())
        self.scaler.unscale_(self.optimizer)
        self._limit()
        self._update()
        return sum(parts[1:], parts[0])

    def check(self) -> None:
        """Raise NonFinite for the first loss or gradient since the last check that was not finite."""
        unread, self._unread = self._unread, []
        values = torch.stack([value.float() for _, _, value in unread]).tolist() if unread else []
        for (what, step, _), value in zip(unread, values, strict=True):
            if not math.isfinite(value):
                raise NonFinite(what, step, value)

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return self.schedule.at(self.step - 1)

    @property
    def whole(self) -> bool:
        """Whether weights, optimizer and step belong together, so that the state may be saved."""
        return not (self._updating or self._rewound)

    def settle(self) -> None:
        """Go back if an update was cut short, or left values that are not finite."""
        if self._updating or not all(bool(p.isfinite().all()) for p in self._parameters):
            self.back()

    def back(self) -> None:
        """Put the weights into their last good state. The optimizer stays: see `whole`."""
        if self._good is not None:
            reached, self.step = self.step, self._good.put_back()
            self._rewound = self._rewound or self._updating or self.step < reached
            self._updating = False

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        scaler = self.scaler.state_dict()
        return {"step": self.step, "optimizer": self.optimizer.state_dict(), "scaler": scaler or None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where another run was, once the weights are those it had."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self._take()

    def _take(self) -> None:
        if self._good is not None:
            self._good.take(self.step)

    def _watch(self, what: str, value: Tensor) -> None:
        if not self._prompt:
            self._unread.append((what, self.step + 1, value.detach()))
        elif not math.isfinite(number := float(value.detach())):
            raise NonFinite(what, self.step + 1, number)

    def _limit(self) -> None:
        """Limit the norm of all gradients together."""
        trained = [p for p in self._parameters if p.grad is not None]
        if not trained:
            raise TrainingError("no parameter has a gradient: the loss does not depend on what is trained")
        norm = torch.nn.utils.clip_grad_norm_(trained, math.inf if self._clip is None else self._clip)
        finite = not self.scaler.is_enabled() or bool(norm.isfinite())
        self._skipped = 0 if finite else self._skipped + 1
        if finite:
            self._watch("norm of the gradients", norm)
        elif self._skipped > _SKIPS:  # until then the scaler leaves the step out and lowers its scale
            raise NonFinite("norm of the gradients", self.step + 1, float(norm))

    def _update(self) -> None:
        self._take()
        set_rate(self.optimizer, self.schedule.at(self.step))
        self._updating = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self._updating = False
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _unsynced(self, wanted: bool) -> Iterator[None]:
        """Keep gradients to this process; the last pass of a step sums them."""
        if wanted and hasattr(self._forward, "no_sync"):
            with self._forward.no_sync():
                yield
        else:
            yield
