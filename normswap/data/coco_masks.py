"""Masks of objects as COCO writes them: run lengths, plain or compressed, and polygons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_FINER = 8
_FARTHEST = 1e7


def mask_of(segmentation: Any, height: int, width: int) -> Tensor:
    """uint8 `(height, width)` from a COCO `segmentation`: a list of polygons, or run lengths as a dict.

    Polygons are flat lists `x1, y1, x2, y2, ...` in pixels; run lengths are `{"size": [height, width], "counts": ...}`
    with counts down the columns, as numbers or as pycocotools compresses them to a string.

    Raises ValueError, with the reason in a few words, for anything else.
    """
    if isinstance(segmentation, dict):
        return _from_runs(segmentation, height, width)
    if isinstance(segmentation, list) and segmentation:
        return _from_polygons(segmentation, height, width)
    raise ValueError("it is neither a list of polygons nor run lengths")


def rle_of(mask: Tensor) -> dict[str, Any]:
    """Uncompressed run lengths of a mask `(H, W)`, the inverse of `mask_of`."""
    flat = mask.bool().t().reshape(-1).numpy()
    edges = np.flatnonzero(np.diff(flat)) + 1
    bounds = [0, *([0] if flat[0] else []), *edges.tolist(), len(flat)]  # counts begin with the zeros
    return {"size": list(mask.shape), "counts": np.diff(bounds).tolist()}


def _from_runs(rle: dict[str, Any], height: int, width: int) -> Tensor:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise ValueError(f"its size is {size}, the image's [{height}, {width}]")
    if isinstance(counts, str):
        counts = _decompressed(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError("its counts are neither numbers nor a string")
    if sum(counts) != height * width:
        raise ValueError(f"its counts add up to {sum(counts)} pixels, not to {height} x {width}")
    values: NDArray[np.uint8] = np.arange(len(counts), dtype=np.uint8) % 2
    return torch.from_numpy(np.repeat(values, counts).reshape(width, height).T.copy())


def _decompressed(text: str) -> list[int]:
    """The numbers in pycocotools' string: 5 bits a character, differences to the last but one (its maskApi.c)."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError("its counts are no compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _from_polygons(polygons: list[Any], height: int, width: int) -> Tensor:
    mask = np.zeros((height, width), dtype=np.uint8)
    for polygon in polygons:
        if not _is_polygon(polygon):
            raise ValueError("a polygon is not a list of at least three points x1, y1, x2, y2, ...")
        x, y = (np.array(polygon[i::2]) for i in (0, 1))
        left, top = max(0, math.floor(x.min())), max(0, math.floor(y.min()))
        right, bottom = min(width, math.ceil(x.max())), min(height, math.ceil(y.max()))
        if left < right and top < bottom:
            mask[top:bottom, left:right] |= _filled(x - left, y - top, bottom - top, right - left)
    return torch.from_numpy(mask)


def _filled(x: NDArray[np.float64], y: NDArray[np.float64], height: int, width: int) -> NDArray[np.uint8]:
    """The pixels that a polygon covers by half. PIL also fills the pixels on its edge, hence the finer grid."""
    from PIL import Image, ImageDraw

    fine = Image.new("L", (width * _FINER, height * _FINER))
    points = np.stack([x, y], axis=1) * _FINER
    ImageDraw.Draw(fine).polygon(points.ravel().tolist(), fill=1)
    covered = np.asarray(fine).reshape(height, _FINER, width, _FINER).mean((1, 3)) >= 0.5
    return covered.astype(np.uint8)


def _is_polygon(values: Any) -> bool:
    return isinstance(values, Sequence) and len(values) >= 6 and len(values) % 2 == 0 and all(map(is_number, values))


def is_number(value: Any) -> bool:
    """A number that a pixel may have, which JSON's `true` and `NaN` are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_FARTHEST <= value <= _FARTHEST
