"""What `data=` and `--data` accept -> batches of (forward's arguments, labels)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from ..arguments import whole
from ..errors import DataError, NormswapError, first_line, plural
from ..modules.tree import device_and_dtype
from .image_folder import ImageData, open_images
from .one_batch import ACCEPTED, Batch, described, images_in, labels_of, split

Transform = Callable[[Any], Tensor]
MAX_BAD = 10
"""How many images that cannot be read are left out, where nothing else was said."""


@dataclass(frozen=True)
class Batches:
    """Iterates over `(args, labels)`, any number of times.

    args: the positional arguments of the network's forward; labels: int64 `(N,)`, or None where there are none, or
    what comes with the inputs is not one class for each of them (boxes, masks, several labels). Nothing is moved
    to another device or dtype: see `placed`. classes: the names the labels count, where the source knows them.
    network: whose arguments a dict's keys are, by their names. inputs: how many it is known to be given.
    labelled: every batch has labels, as `split` has it.
    """

    source: Iterable[Any]
    classes: tuple[str, ...] | None = None
    network: nn.Module | None = None
    inputs: int | None = None
    labelled: bool = False

    @property
    def bad(self) -> tuple[str, ...]:
        """The images that could not be read and were left out, with the reason."""
        return tuple(getattr(self.source, "bad", ()))

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError for a batch it cannot read, and when there is none."""
        empty = True
        for item in self.source:
            args, labels = split(item, self.network, self.inputs, labelled=self.labelled)
            if images_in(args) > 0:
                empty = False
                yield args, labels
        if empty:
            if self.bad:
                raise DataError(f"none of the images could be read; the first: {self.bad[0]}")
            raise DataError("data holds no image", hint="A generator can be read only once; give list(...) of it.")


def as_batches(
    data: Any,
    batch_size: int = 64,
    *,
    once: bool = False,
    preprocess: Transform | None = None,
    max_bad: int = MAX_BAD,
    network: nn.Module | None = None,
    inputs: int | None = None,
) -> Batches:
    """Read what the Python API accepts as `data=`.

    data: a tensor `(N, *)`, or a pair of it and int64 labels `(N,)`, cut into batches of `batch_size`; a Dataset of
    samples, likewise (with boxes, as from `open_coco`: batches are lists of images); a DataLoader or another iterable
    of batches, which keep their size; an `ImageData` or a folder's path, read with `preprocess` (by default
    `Preprocess()`), where `max_bad` images that cannot be read are left out.
    A batch is a tensor, `(x, y)`, a dict (the values of the first known keys, such as "pixel_values" and "labels"),
    or a list of images `(C, H, W)` with 1, 3 or 4 channels, as torchvision's detectors take; x may be any of these,
    or a tuple of tensors for a forward with several arguments, or a list of one dict for each image.
    network: what the batches are for. Of as many tensors as its forward needs, if that is more than one, all are
    inputs, and one more is y. So is what goes with x by the name of an optional argument, in the order of forward: one
    number for each sample of "lengths", "x_lens", ..., a tensor `(N, T)` or larger of a "mask"; with `forward(x,
    lengths=None)` a batch is `(x, lengths)` or `(x, lengths, y)`. A dict gives it all arguments that have the names of
    its keys; where none has, and no key is known, the dict itself. inputs: how many arguments the network is given in
    any case, as of its example inputs.
    once: the caller iterates a single time. Otherwise a generator, which can be read only once, is read into memory.

    Raises OptionError for a batch size below 1, and DataError, saying what is accepted, for anything else.
    """
    whole("batch_size", batch_size)
    if isinstance(data, Batches):
        return data if network is None else replace(data, network=network, inputs=inputs)
    return replace(_batches(data, batch_size, once, preprocess, max_bad), network=network, inputs=inputs)


def _batches(data: Any, batch_size: int, once: bool, preprocess: Transform | None, max_bad: int) -> Batches:
    data = opened(data, batch_size, preprocess, max_bad)
    if is_pair(data):
        inputs, labels = data
        return Batches(list(zip(inputs.split(batch_size), labels.split(batch_size), strict=True)))
    if isinstance(data, Tensor):
        if data.dim() == 0:
            raise DataError("data is a single number, not a batch", hint=ACCEPTED)
        return Batches(data.split(batch_size) if len(data) else ())
    if isinstance(data, Mapping):
        return Batches((data,))
    classes = _classes_of(data)
    if isinstance(data, Dataset) and not isinstance(data, DataLoader):
        data = DataLoader(data, batch_size=batch_size, collate_fn=collated)
    if not isinstance(data, Iterable):
        raise DataError(f"data is {described(data)}", hint=ACCEPTED)
    if isinstance(data, Iterator) and not once:
        data = list(data)
    return Batches(data, classes)


def opened(data: Any, batch_size: int, preprocess: Transform | None = None, max_bad: int = MAX_BAD) -> Any:
    """Batches of a folder's images; anything else as it is."""
    if isinstance(data, (str, os.PathLike)):
        data = open_images(data)
    return data.batches(preprocess, batch_size, max_bad=max_bad) if isinstance(data, ImageData) else data


def is_pair(data: Any) -> bool:
    """Whether that is inputs `(N, *)` and whole numbers `(N,)`, and not two batches of inputs."""
    if not (isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)):
        return False
    inputs, labels = data
    return inputs.dim() > 1 and labels.dim() == 1 and labels_of(labels, len(inputs)) is not None


PADS = "A DataLoader whose collate_fn pads them can be given in place of the Dataset"
"""The way out for samples of different length."""


def collated(items: Sequence[Any]) -> Any:
    """A batch of a Dataset's samples: as torch stacks them; images that come with boxes, as lists of both.

    Such images differ in size and in how many boxes they have, and torchvision's detectors take lists.
    """
    if all(isinstance(i, (tuple, list)) and len(i) == 2 and _has_boxes(i[1]) for i in items):
        return [list(column) for column in zip(*items, strict=True)]
    return stacked(items)


def stacked(items: Sequence[Any]) -> Any:
    """Samples as torch makes a batch of them. Raises DataError where they differ in size, or are none."""
    try:
        return default_collate(list(items))
    except (RuntimeError, TypeError) as error:
        raise DataError(
            f"samples cannot form a batch ({first_line(error)})",
            hint=f"{PADS}; a data set of whole batches as DataLoader(data, batch_size=None).",
        ) from error


def _has_boxes(target: Any) -> bool:
    return isinstance(target, Mapping) and "boxes" in target


def rows(value: Any, which: slice, count: int) -> Any:
    """Those images of an argument that holds `count`; anything else goes with every part."""
    if isinstance(value, Mapping):
        return {key: rows(each, which, count) for key, each in value.items()}
    counts = isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
    return value[which] if counts and len(value) == count else value


def placed(args: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The arguments on a device, floating tensors in a dtype; tuples and lists keep their structure."""
    if isinstance(args, Tensor):
        return args.to(device, dtype if args.is_floating_point() else args.dtype)
    if isinstance(args, (list, tuple)):
        return type(args)(placed(item, device, dtype) for item in args)
    if isinstance(args, Mapping):
        return {key: placed(item, device, dtype) for key, item in args.items()}
    return args


def _classes_of(data: Any) -> tuple[str, ...] | None:
    """Class names, where an image folder stands behind the data (ours, or torchvision's in a DataLoader)."""
    names = getattr(data, "classes", None) or getattr(getattr(data, "dataset", None), "classes", None)
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else None


CHECK_IMAGES = (
    "Check the size and channels of the images. Each element of data is a batch: one tensor (N, C, H, W), or, for "
    "torchvision's detectors, a list of images, so that a single batch is data=[images]."
)


def run_on(call: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], *, fewer: str) -> Any:
    """`call` on one batch of forward's arguments, placed where `model` is and in its dtype.

    Raises DataError for whatever it raises on inputs it was not made for; `fewer` says how to need less memory.
    """
    try:
        return call(*placed(args, *device_and_dtype(model)))
    except NormswapError:
        raise
    except torch.OutOfMemoryError as error:
        raise DataError(f"a batch of {plural(images_in(args), 'image')} does not fit in memory", hint=fewer) from error
    except Exception as error:  # whatever a stranger's forward raises
        raise DataError(
            f"{type(model).__name__} cannot run on the data ({type(error).__name__}: {first_line(error)})",
            hint=CHECK_IMAGES,
        ) from error
