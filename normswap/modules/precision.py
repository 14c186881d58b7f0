"""What figures are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself where it is float32 or float64, otherwise its values in float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
