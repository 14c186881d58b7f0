"""Masks of objects as COCO writes them, run lengths and polygons: pycocotools, and checks of what it is given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NormswapError
from .coco_annotations import is_number

_COMPRESSED = re.compile("[0-o]*[0-O]")  # 6 bits a character, of which one says that the number goes on


def mask_of(segmentation: Any, height: int, width: int) -> Tensor:
    """uint8 `(height, width)` from a COCO `segmentation`: a list of polygons, or run lengths as a dict.

    Polygons are flat lists `x1, y1, x2, y2, ...` in pixels; run lengths are `{"size": [height, width], "counts": ...}`
    with counts down the columns, as numbers or as pycocotools compresses them to a string.

    Raises ValueError, with the reason in a few words, for anything else.
    """
    peer = pycocotools_mask()
    if isinstance(segmentation, dict):
        runs = _checked_runs(segmentation, height, width)
        runs = runs if isinstance(runs["counts"], str) else peer.frPyObjects(runs, height, width)
    elif isinstance(segmentation, list) and segmentation:
        if not all(map(_is_polygon, segmentation)):
            raise ValueError("a polygon is not a list of at least three points x1, y1, x2, y2, ...")
        runs = peer.merge(peer.frPyObjects(segmentation, height, width))
    else:
        raise ValueError("it is neither a list of polygons nor run lengths")
    return torch.from_numpy(np.ascontiguousarray(peer.decode(runs)))


def rle_of(mask: Tensor) -> dict[str, Any]:
    """Compressed run lengths of a mask `(H, W)`, fit for JSON; the inverse of `mask_of`."""
    runs = pycocotools_mask().encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": list(mask.shape), "counts": runs["counts"].decode("ascii")}


def pycocotools_mask() -> Any:
    """The module `pycocotools.mask`. Raises NormswapError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        hint = "pip install 'normswap[train]'"
        raise NormswapError("masks in the COCO format need pycocotools, which is not installed", hint=hint) from error
    return mask


def _checked_runs(runs: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Size and counts alone. pycocotools reads beyond the end of a string that is cut off, and fills up numbers."""
    size, counts = runs.get("size"), runs.get("counts")
    if size != [height, width]:
        raise ValueError(f"its size is {size}, the image's [{height}, {width}]")
    if isinstance(counts, str):
        if not _COMPRESSED.fullmatch(counts):
            raise ValueError("its counts are no compressed run lengths")
    elif not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError("its counts are neither numbers nor a string")
    elif sum(counts) != height * width:
        raise ValueError(f"its counts add up to {sum(counts)} pixels, not to {height} x {width}")
    return {"size": size, "counts": counts}


def _is_polygon(values: Any) -> bool:
    return isinstance(values, Sequence) and len(values) >= 6 and len(values) % 2 == 0 and all(map(is_number, values))
