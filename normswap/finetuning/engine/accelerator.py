"""Hugging Face accelerate, and as much of it as the loop needs: devices, processes, precision, gradients."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import Fix, NormswapError, OptionError, Text
from ...training.optimizer import set_rate
from ..settings import PRECISIONS


@contextmanager
def processes(device: str, precision: str) -> Iterator[Any]:
    """An `accelerate.Accelerator` on a device, joined to the other processes that torchrun or accelerate started.

    They part at the end, if they were not together before: a process that simply exits makes the others fail.

    Raises OptionError for a device that is not there, or a precision that it does not compute in, and NormswapError
    without accelerate.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise NormswapError("training needs accelerate", hint="pip install 'normswap[train]'") from error
    _check_device(device, precision)
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not together)  # of a run before this one, on another device
    accelerator = Accelerator(cpu=_on_cpu(device), mixed_precision=PRECISIONS[precision])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started and not together:
        raise NormswapError(f"{started} processes were started, and {accelerator.num_processes} found each other")
    yield accelerator
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        if not together:
            torch.distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def _check_device(device: str, precision: str) -> None:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True, "auto": True}
    if not there[device]:
        has = ", ".join(name for name in ("cuda", "mps", "cpu") if there[name])
        raise OptionError(
            f"there is no {device} device here", hint=Text(Fix("device", "auto"), f" takes what there is: {has}.")
        )
    if precision == "fp16" and _on_cpu(device):
        raise OptionError("a CPU does not train in fp16", hint=Text(Fix("precision", "bf16"), " or fp32."))


def _on_cpu(device: str) -> bool:
    """accelerate has to be told: it joins processes on a CPU only if that is where they are meant to be."""
    there = torch.cuda.is_available() or torch.backends.mps.is_available()
    return device == "cpu" or (device == "auto" and not there)


class Optimization:
    """Gradients and updates of some parameters, the same for one process and for many.

    model: what to call in training: the network itself, or the wrapper that sums gradients over the processes.
    """

    def __init__(
        self,
        accelerator: Any,
        network: nn.Module,
        optimizer: Optimizer,
        clip: float | None,
    ) -> None:
        self.accelerator, self.optimizer, self._clip = accelerator, optimizer, clip
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = accelerator.scaler
        self.updating = False
        """Whether an update was cut short, so that the parameters no longer belong together."""
        self.model: Any = accelerator.prepare_model(network) if accelerator.num_processes > 1 else network

    def step(self, losses: Sequence[Callable[[], Tensor]], rate: float) -> Tensor:
        """One update with the mean gradient of several losses, computed one after the other. Returns their mean."""
        total: Tensor | None = None
        last = len(losses) - 1
        for i, loss_of in enumerate(losses):
            with self._unsynced(i < last):
                with self.accelerator.autocast():
                    loss = loss_of()
                if last:
                    loss = loss / (last + 1)
                self.accelerator.backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
        self._update(rate)
        if total is None:
            raise ValueError("a step needs a loss")
        return total

    def _update(self, rate: float) -> None:
        set_rate(self.optimizer, rate)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self.updating = True
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.updating = False
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _unsynced(self, wanted: bool) -> Iterator[None]:
        """Keep gradients to this process; the last pass of a step sums them."""
        if wanted and hasattr(self.model, "no_sync"):
            with self.model.no_sync():
                yield
        else:
            yield
