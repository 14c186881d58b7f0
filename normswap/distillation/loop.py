"""Optimisation steps that never leave a network in a broken state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import Fix, Text, TrainingError
from ..training.optimizer import set_rate
from ..training.schedule import Schedule

SMALLER = Text("Try a smaller learning rate, ", Fix("lr"), ", or ", Fix("precision", "fp32"), ".")
_SKIPS = 20
"""So many steps in a row whose float16 gradients overflow end the run: lowering the loss scale does not help then."""


class Loop:
    """Steps of an optimizer over some parameters, with a copy of their last values that gave a finite loss.

    step: how many are done. losses: one for each. schedule: of the learning rate. scaling: scale the loss for float16
    gradients.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        *,
        steps: int,
        schedule: Schedule,
        max_grad_norm: float | None,
        scaling: bool = False,
    ) -> None:
        self.parameters = dict(parameters)
        self.optimizer, self.steps, self.schedule, self.max_grad_norm = optimizer, steps, schedule, max_grad_norm
        device = next(iter(parameters.values())).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=scaling)
        self.step = 0
        self.losses: list[float] = []
        self._good = [p.detach().clone() for p in self.parameters.values()]
        self._good_step = 0
        self._updating = self._rewound = False
        self._skipped = 0

    def advance(self, loss_at: Callable[[int], Tensor]) -> float:
        """One step: the loss of `loss_at(step)`, its gradients, the update. Returns the loss.

        Raises TrainingError when loss or gradients are not finite. Then, as after an interrupt at any place, `settle`
        puts the parameters into their last good state.
        """
        loss = loss_at(self.step)
        value = float(loss.detach())
        if not math.isfinite(value):
            at = self.step + 1
            self._back()
            raise TrainingError(f"the loss is {value} at step {at}; the network is as it was before", hint=SMALLER)
        self._keep()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self._clip()
        set_rate(self.optimizer, self.schedule.at(self.step))
        self._updating = True
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.losses.append(value)
        self._updating = False
        return value

    def settle(self) -> None:
        """Put the parameters back if an update was cut short, or left values that are not finite."""
        if self._updating or not all(bool(p.isfinite().all()) for p in self.parameters.values()):
            self._back()

    @property
    def whole(self) -> bool:
        """Whether parameters, optimizer and step belong together, so that the state may be saved."""
        return not (self._updating or self._rewound)

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {
            "step": self.step,
            "losses": list(self.losses),
            "parameters": {name: p.detach().cpu() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where another loop was."""
        for name, p in self.parameters.items():
            p.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.losses = state["step"], list(state["losses"])
        self._keep()

    def _clip(self) -> None:
        """Limit the norm of all gradients together."""
        trained = [p for p in self.parameters.values() if p.grad is not None]
        if not trained:
            raise TrainingError("no parameter has a gradient: the loss does not depend on what is trained")
        norm = torch.nn.utils.clip_grad_norm_(trained, math.inf if self.max_grad_norm is None else self.max_grad_norm)
        if bool(norm.isfinite()):
            self._skipped = 0
        elif self.scaler.is_enabled() and self._skipped < _SKIPS:
            self._skipped += 1  # the scaler leaves this step out and lowers its scale
        else:
            raise TrainingError(
                f"the gradients are not finite at step {self.step + 1}; the network is as before", hint=SMALLER
            )

    @torch.no_grad()
    def _keep(self) -> None:
        for kept, p in zip(self._good, self.parameters.values(), strict=True):
            kept.copy_(p)
        self._good_step = self.step

    @torch.no_grad()
    def _back(self) -> None:
        for kept, p in zip(self._good, self.parameters.values(), strict=True):
            p.copy_(kept)
        self._rewound = self._rewound or self.step > self._good_step or self._updating
        self.step, self.losses = self._good_step, self.losses[: self._good_step]
        self._updating = False
