"""Samples of a classifier -> a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.batches import PADS
from ...errors import DataError, Fix, Text


def collate(items: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
    """`(N, *)` and int64 `(N,)`. Raises DataError for inputs of different sizes or labels that are no numbers."""
    for item in items:
        if not (isinstance(item, (tuple, list)) and len(item) == 2):
            raise DataError(f"a sample is of type {type(item).__name__}", hint="A sample is a pair (input, label).")
    inputs = [_tensor(x) for x, _ in items]
    for x in inputs:
        if x.shape != inputs[0].shape:
            images = _is_image(inputs[0]) and _is_image(x)
            raise DataError(
                f"{'images' if images else 'samples'} of different sizes cannot form a batch: "
                f"{tuple(inputs[0].shape)} and {tuple(x.shape)}",
                hint=Text("Give one size for all, such as ", Fix("size", 224), ".") if images else f"{PADS}.",
            )
    return torch.stack(inputs), torch.tensor([_label(y) for _, y in items])


def _is_image(x: Tensor) -> bool:
    return x.dim() == 3 and x.shape[0] in (1, 3, 4)


def _tensor(x: Any) -> Tensor:
    try:
        x = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"an input is of type {type(x).__name__}, not a tensor",
            hint="Let the Dataset turn it into a float tensor (C, H, W), normalised as the network was trained.",
        ) from None
    check_input(x)
    return x


def check_input(x: Tensor) -> None:
    """Raise DataError for pixels that have not been normalised."""
    if x.dtype == torch.uint8:
        raise DataError(
            "the images are uint8; a network takes floating values",
            hint="Normalise them as the network was trained, for example (images / 255 - mean) / std.",
        )


def _label(y: Any) -> int:
    try:
        number = int(y)
        if number == y and number >= 0:
            return number
    except (TypeError, ValueError):
        pass
    raise DataError(f"a label is {y!r}; a classifier's labels are whole numbers from 0")
