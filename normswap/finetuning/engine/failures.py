"""What a failing step means to the user, and the way out."""

from __future__ import annotations

import torch

from ...errors import DataError, Fix, NormswapError, Text, TrainingError, first_line
from ...training.updates import NonFinite

LESS_MEMORY = Text(
    "Try a smaller ", Fix("batch_size"), " with a larger ", Fix("accumulate"), ", ", Fix("precision", "bf16"),
    ", or smaller images.",
)  # fmt: skip


def explain(error: BaseException, where: str, device: torch.device, left: str) -> NormswapError | None:
    """The error to raise in place of this one; None for one that says enough, or that is a fault of ours.

    where: what was being done, as "step 12" or "validation". left: what is left now, as `Checkpointer.told` says it.
    """
    if isinstance(error, NonFinite):
        return TrainingError(
            f"{error}; {left}",
            hint=Text("Try a smaller ", Fix("lr"), ", ", Fix("clip_grad", 1.0), ", or ", Fix("precision", "fp32"), "."),
        )
    if isinstance(error, DataError):
        return DataError(Text(error.message, f"; {left}"), hint=error.hint)
    if is_memory(error):
        return TrainingError(
            f"{where} does not fit into the memory of {device}; {left}",
            hint=LESS_MEMORY,
        )
    if is_compiling(error):
        return TrainingError(
            f"torch.compile cannot compile the network, at {where}; {left} ({first_line(error)})",
            hint=Text("Leave ", Fix("compile"), " out."),
        )
    if is_lost(error):
        return TrainingError(
            f"another process has ended, at {where}; {left}",
            hint="What that one printed, on its own node, says why.",
        )
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return TrainingError(
            "BatchNorm cannot train on a single value per channel, as it gets here",
            hint=Text("Try a larger ", Fix("batch_size"), ", ", Fix("freeze_stats", True), ", or another norm."),
        )
    return None


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out; on a CPU torch says so in a RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(t in str(error) for t in ("out of memory", "can't allocate memory"))


def is_lost(error: BaseException) -> bool:
    """Whether the connection to another process broke; gloo says so in a RuntimeError."""
    if isinstance(error, getattr(torch.distributed, "DistError", ())):
        return True
    said = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def is_compiling(error: BaseException) -> bool:
    """Whether it comes from torch.compile: a missing compiler, or a network that it does not take."""
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__)
