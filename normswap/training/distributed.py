"""What processes that train together tell each other."""

from __future__ import annotations

from typing import Any

import torch


def gathered(value: Any) -> list[Any]:
    """The value that each process gives, for all of them; what can be pickled. Each process must call this."""
    group = torch.distributed
    if not (group.is_available() and group.is_initialized()):
        return [value]
    found: list[Any] = [None] * group.get_world_size()
    group.all_gather_object(found, value)
    return found
