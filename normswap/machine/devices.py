"""Which device a name means."""

from __future__ import annotations

import torch

from ..choices import DEVICES
from ..errors import Fix, OptionError, Text, did_you_mean, first_line


def device_of(name: torch.device | str) -> torch.device:
    """The device that a name means: `auto` is CUDA where there is one, else MPS, else the CPU; `cuda:1` names one.

    Raises OptionError for a name that is none, and for a device that is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, usable in there.items() if usable))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(
            f"device {str(name)!r} cannot be used: {first_line(error)}",
            hint=did_you_mean(str(name).partition(":")[0], DEVICES) or f"Known are {', '.join(DEVICES)}, cuda:1.",
        ) from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not there.get(device.type, True) or (device.index or 0) >= count:
        has = ", ".join(kind for kind, usable in there.items() if usable)
        raise OptionError(
            f"device {str(name)!r} cannot be used: there is none here",
            hint=Text(Fix("device", "auto"), f" takes what there is: {has}."),
        )
    return device
