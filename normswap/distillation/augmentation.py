"""Random changes of a batch of images that leave what they show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SHIFT = 1 / 8
"""The largest shift, as a share of the image's height and width: 4 pixels of 32."""


def augmented(args: tuple[Any, ...], how: str) -> tuple[Any, ...]:
    """Forward's arguments with changed images, if the first is a batch `(N, C, H, W)`.

    how: "auto" (`mirrored` and `shifted`), "flip" (`mirrored`) or "none".
    """
    if how == "none" or not (args and isinstance(args[0], Tensor) and args[0].dim() == 4):
        return args
    images = mirrored(args[0])
    return (shifted(images) if how == "auto" else images), *args[1:]


def mirrored(images: Tensor) -> Tensor:
    """Each image `(C, H, W)` left-right reversed or not, with equal chance."""
    flip = torch.rand(len(images)) < 0.5
    return torch.where(flip.to(images.device)[:, None, None, None], images.flip(3), images)


def shifted(images: Tensor, share: float = SHIFT) -> Tensor:
    """Each image moved by up to `share` of its size in each direction; what comes in is the image, reflected.

    The usual augmentation of small images (He et al. 2015, section 4.2), without its black border, which a network
    whose norms measure each sample would measure too.
    """
    count, _, height, width = images.shape
    rows, columns = (_moved(size, count, share).to(images.device) for size in (height, width))
    which = torch.arange(count, device=images.device)[:, None, None]
    return images.movedim(1, -1)[which, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def _moved(size: int, count: int, share: float) -> Tensor:
    """Indices `(count, size)` of a shifted axis, reflected at its ends without repeating them."""
    most = min(round(size * share), size - 1)
    index = torch.arange(size) + torch.randint(-most, most + 1, (count, 1))
    return size - 1 - (size - 1 - index.abs()).abs()
