"""Photographs that come with the package, and random crops of them; sources and licences are in NOTICE.md."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...arguments import whole
from ..preprocess import as_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

_AREA = (0.02, 0.3)  # of a crop, as a share of its photograph's; more where it would have to be enlarged
_RATIO = 4 / 3
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R 601-2


@cache
def photographs() -> tuple[Image, ...]:
    """All of them, in mode RGB, their sides between 172 and 600 pixels."""
    from PIL import Image

    return tuple(Image.open(file).convert("RGB") for file in sorted(Path(__file__).parent.glob("*.jpg")))


def crops(count: int, size: tuple[int, ...], channels: int = 3, seed: int = 0) -> Tensor:
    """Random crops, float32 `(count, channels, *size)` in [0, 1]; luminance for one channel.

    The photographs take turns. Each crop has a random place, size and shape and may be mirrored; it is resized
    with antialiasing. The same seed gives the same crops.
    """
    whole("count", count)
    pictures = photographs()
    draws = torch.rand(count, 5, generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.stack([_crop(pictures[i % len(pictures)], size, channels, u) for i, u in enumerate(draws)])


def _crop(picture: Image, size: tuple[int, ...], channels: int, u: list[float]) -> Tensor:
    """u: five numbers in [0, 1] that decide it."""
    from PIL.Image import Resampling

    whole_area = picture.width * picture.height
    least = min(1.0, max(_AREA[0], size[0] * size[1] / whole_area))
    most = max(_AREA[1], min(1.0, 3 * least))
    area = whole_area * (least + (most - least) * u[0])
    ratio = size[1] / size[0] * _RATIO ** (2 * u[1] - 1)
    width, height = min(picture.width, math.sqrt(area * ratio)), min(picture.height, math.sqrt(area / ratio))
    left, top = u[2] * (picture.width - width), u[3] * (picture.height - height)
    box = (left, top, left + width, top + height)
    x = as_tensor(picture.resize((size[1], size[0]), Resampling.BILINEAR, box))
    x = x.flip(2) if u[4] < 0.5 else x
    return x if channels == 3 else (x * _LUMA).sum(0, keepdim=True)
