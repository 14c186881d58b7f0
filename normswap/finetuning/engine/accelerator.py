"""Hugging Face accelerate, and as much of it as the loop needs: devices, processes, precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import Fix, NormswapError, OptionError, Text
from ...training.distributed import started
from ..settings import PRECISIONS


@contextmanager
def processes(device: str, precision: str) -> Iterator[Any]:
    """An `accelerate.Accelerator` on a device, joined to the other processes that torchrun or accelerate started.

    They part at the end, if they were not together before: a process that simply exits makes the others fail.

    Raises OptionError for a device that is not there, or a precision that it does not compute in, and NormswapError
    without accelerate.
    """
    with _needed():
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    _check_device(device, precision)
    together = _together()
    AcceleratorState._reset_state(reset_partial_state=not together)  # of a run before this one, on another device
    with _current(device):
        accelerator = Accelerator(cpu=_on_cpu(device), mixed_precision=PRECISIONS[precision])
        if accelerator.num_processes != started() and not together:
            raise NormswapError(f"{started()} processes were started, and {accelerator.num_processes} found each other")
        yield accelerator
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        if not together:
            torch.distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def met(device: str) -> Iterator[None]:
    """The processes that torchrun or accelerate started, joined before `processes` needs them.

    Then what stops one of them is heard by the others. They part at the end, unless by an error. Raises as `processes`.
    """
    if started() == 1 or _together():
        yield
        return
    with _needed():
        from accelerate.state import AcceleratorState, PartialState
    _check_device(device, "fp32")
    AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=_on_cpu(device))
    yield
    state.wait_for_everyone()
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise NormswapError("training needs accelerate", hint="pip install 'normswap[train]'") from error


def _check_device(device: str, precision: str) -> None:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True, "auto": True}
    kind, _, index = device.partition(":")
    if index and started() > 1:
        raise OptionError(
            f"{device} is one GPU, and each of {started()} processes takes one of its own",
            hint=Text(Fix("device", "cuda"), " shares them out; CUDA_VISIBLE_DEVICES says which there are."),
        )
    if not there[kind] or (index and int(index) >= torch.cuda.device_count()):
        has = ", ".join(name for name in ("cuda", "mps", "cpu") if there[name])
        raise OptionError(
            f"there is no {device} device here", hint=Text(Fix("device", "auto"), f" takes what there is: {has}.")
        )
    if precision == "fp16" and _on_cpu(device):
        raise OptionError("a CPU does not train in fp16", hint=Text(Fix("precision", "bf16"), " or fp32."))


@contextmanager
def _current(device: str) -> Iterator[None]:
    """Of several GPUs, accelerate takes the current one."""
    with torch.cuda.device(device) if ":" in device else nullcontext():
        yield


def _on_cpu(device: str) -> bool:
    """accelerate has to be told: it joins processes on a CPU only if that is where they are meant to be."""
    there = torch.cuda.is_available() or torch.backends.mps.is_available()
    return device == "cpu" or (device == "auto" and not there)


@contextmanager
def compiled(forward: Any, model: nn.Module, part: str | None) -> Iterator[Any]:
    """Compile a part of the model for the time of a run, or all where there is no such part. Yields what to call."""
    found = None if part is None else getattr(model, part, None)
    if not isinstance(found, nn.Module):
        yield torch.compile(forward)
        return
    before = found._compiled_call_impl
    found.compile()
    try:
        yield forward
    finally:
        found._compiled_call_impl = before


class Processes:
    """What the processes of a run tell each other."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.together: bool = accelerator.num_processes > 1

    def total(self, value: Tensor) -> Tensor:
        """The sum over all of them."""
        if not self.together:
            return value
        device = self._accelerator.device
        value = value.to(device, torch.float32 if device.type == "mps" else torch.float64)
        found: Tensor = self._accelerator.reduce(value, "sum")
        return found.cpu()

    def largest(self, number: int) -> int:
        """The largest of the numbers that they have."""
        own = torch.tensor([number], device=self._accelerator.device)
        return int(self._accelerator.gather(own).max())
