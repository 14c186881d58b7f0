"""What processes that train together tell each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import Fix, NormswapError, OptionError, Text, first_line, plainly


def gathered(value: Any) -> list[Any]:
    """The value that each process gives, for all of them; what can be pickled. Each process must call this."""
    group = torch.distributed
    if not (group.is_available() and group.is_initialized()):
        return [value]
    found: list[Any] = [None] * group.get_world_size()
    group.all_gather_object(found, value)
    return found


def started() -> int:
    """How many processes torchrun or accelerate launch has started, on all nodes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def all_or_none() -> Iterator[None]:
    """What one process cannot do, stops them all: the others raise a NormswapError with its words and where it ran.

    Otherwise they would wait for it; and on another node no launcher ends them. Each process must come here.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as found:
        error = found
    told = None
    if error is not None:
        message = error.message if isinstance(error, NormswapError) else f"{type(error).__name__}: {first_line(error)}"
        told = (socket.gethostname(), message, getattr(error, "hint", None))
    others = [(rank, *said) for rank, said in enumerate(gathered(told)) if said is not None]
    if error is not None:
        raise error
    for rank, host, message, hint in others:
        raise NormswapError(Text(f"process {rank}, on {host}, has stopped: ", message), hint=hint)


def check_same(values: Mapping[str, Any]) -> None:
    """Raise OptionError where processes were given different values, by the names of the options; each must call it."""
    for theirs in gathered(dict(values)):
        for name, value in theirs.items():
            if value != values[name]:
                raise OptionError(
                    Text("the processes differ in ", Fix(name), f": {plainly(value)}, and {plainly(values[name])}"),
                    hint="Give all nodes the same command and the same files.",
                )
