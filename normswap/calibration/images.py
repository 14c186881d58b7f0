"""The images to calibrate on, read into memory: both networks see the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..arguments import whole
from ..data.batches import Batches, as_batches, rows
from ..data.one_batch import images_in
from ..errors import DataError, Fix, OptionError, Text
from .moments import Args
from .norm_targets import Target


def collected(
    model: nn.Module,
    data: Any,
    images: int | None,
    batch_size: int,
    preprocess: Callable[[Any], Tensor] | None,
    max_bad: int,
    inputs: int | None = None,
) -> tuple[list[Args], list[Tensor | None], Batches]:
    """The batches to use, the last one cut to what was asked for, in memory: both networks see the same ones.

    With their labels, and what they were read from. inputs: see `as_batches`.
    """
    if images is not None:
        whole("images", images)
    if data is None:
        raise OptionError(
            "images are needed", hint=Text(Fix("data"), " takes a tensor (N, C, H, W), or batches of them.")
        )
    most = images or (len(data) if isinstance(data, Tensor) else 256)
    batches, labels, left = [], [], most
    reading: dict[str, Any] = {"preprocess": preprocess, "max_bad": max_bad, "network": model, "inputs": inputs}
    source = as_batches(data, batch_size, once=True, **reading)
    for args, y in source:
        part, part_y = first_images(args, y, left)
        batches.append(part)
        labels.append(part_y)
        left -= images_in(part)
        if left <= 0:
            break
    return batches, labels, source


def first_images(args: Args, labels: Tensor | None, most: int) -> tuple[Args, Tensor | None]:
    count = images_in(args)
    if count <= most:
        return args, labels
    part = tuple(rows(arg, slice(most), count) for arg in args)
    return part, None if labels is None else labels[:most]


LARGE, OF_LARGE = 96 * 96, 64
"""Of images with so many positions, so many suffice to fit layers: with more, EfficientNet-Lite0 kept no more."""


def fewer_of_large(batches: list[Args], labels: list[Tensor | None]) -> tuple[list[Args], list[Tensor | None]]:
    """Images from all over the batches, where they are large, with labels."""
    x = batches[0][0] if batches and batches[0] else None
    if not isinstance(x, Tensor) or x.dim() < 4 or x[0, 0].numel() < LARGE:
        return batches, labels
    step = max(1, sum(map(images_in, batches)) // OF_LARGE)
    return [_every(args, step) for args in batches], [None if y is None else y[::step] for y in labels]


def _every(args: Args, step: int) -> Args:
    count = images_in(args)
    return tuple(rows(arg, slice(None, None, step), count) for arg in args)


def check_enough(targets: Sequence[Target], count: int, asked: int | None) -> None:
    if asked is not None and count < asked and any(t.statistics for t in targets):
        raise DataError(
            f"running statistics were to be estimated over {asked} images, the data has {count}",
            hint=Text("Give more images, or ask for fewer: ", Fix("images", count), "."),
        )


def leading(batches: Sequence[Args], most: int) -> list[Args]:
    """The first batches with so many images together, the last one cut."""
    found: list[Args] = []
    for args in batches:
        if most <= 0:
            break
        found.append(first_images(args, None, most)[0])
        most -= images_in(args)
    return found
