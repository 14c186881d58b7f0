"""What `data=` and `--data` accept -> batches of (forward's arguments, labels)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, default_collate

from ..arguments import whole
from ..errors import DataError, NormswapError, first_line, plural
from ..modules.tree import device_and_dtype
from .image_folder import ImageData, open_images

Batch = tuple[tuple[Any, ...], Tensor | None]
Transform = Callable[[Any], Tensor]
MAX_BAD = 10
"""How many images that cannot be read are left out, where nothing else was said."""

_INPUTS = ("pixel_values", "pixel_values_videos", "image", "images", "input", "inputs", "x", "data", "video", "img")
_LABELS = ("label", "labels", "target", "targets", "y", "class", "fine_label")
_ACCEPTED = (
    "data takes a tensor (N, C, H, W), a pair of it and labels (N,), a Dataset, a DataLoader or another iterable of "
    "batches, or a folder; a batch is a tensor, (x, y), a dict with a key such as 'pixel_values' or 'image', or with "
    "those of the forward's arguments, or a list of images (C, H, W)"
)


@dataclass(frozen=True)
class Batches:
    """Iterates over `(args, labels)`, any number of times.

    args: the positional arguments of the network's forward; labels: int64 `(N,)`, or None where there are none, or
    what comes with the inputs is not one class for each of them (boxes, masks, several labels). Nothing is moved
    to another device or dtype: see `placed`. classes: the names the labels count, where the source knows them.
    network: whose arguments a dict's keys are, by their names.
    """

    source: Iterable[Any]
    classes: tuple[str, ...] | None = None
    network: nn.Module | None = None

    @property
    def bad(self) -> tuple[str, ...]:
        """The images that could not be read and were left out, with the reason."""
        return tuple(getattr(self.source, "bad", ()))

    def __iter__(self) -> Iterator[Batch]:
        """Raises DataError for a batch it cannot read, and when there is none."""
        empty = True
        for item in self.source:
            args, labels = _split(item, self.network)
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
    inputs, and one more is y. A dict gives it all arguments that have the names of its keys; where none has,
    and no key is known, the dict itself.
    once: the caller iterates a single time. Otherwise a generator, which can be read only once, is read into memory.

    Raises OptionError for a batch size below 1, and DataError, saying what is accepted, for anything else.
    """
    whole("batch_size", batch_size)
    if isinstance(data, Batches):
        return data if network is None else replace(data, network=network)
    return replace(_batches(data, batch_size, once, preprocess, max_bad), network=network)


def _batches(data: Any, batch_size: int, once: bool, preprocess: Transform | None, max_bad: int) -> Batches:
    data = opened(data, batch_size, preprocess, max_bad)
    if is_pair(data):
        inputs, labels = data
        return Batches(list(zip(inputs.split(batch_size), labels.split(batch_size), strict=True)))
    if isinstance(data, Tensor):
        if data.dim() == 0:
            raise DataError("data is a single number, not a batch", hint=_ACCEPTED)
        return Batches(data.split(batch_size) if len(data) else ())
    if isinstance(data, Mapping):
        return Batches((data,))
    classes = _classes_of(data)
    if isinstance(data, Dataset) and not isinstance(data, DataLoader):
        data = DataLoader(data, batch_size=batch_size, collate_fn=collated)
    if not isinstance(data, Iterable):
        raise DataError(f"data is {_described(data)}", hint=_ACCEPTED)
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
    return inputs.dim() > 1 and labels.dim() == 1 and _labels(labels, len(inputs)) is not None


def collated(items: Sequence[Any]) -> Any:
    """A batch of a Dataset's samples: as torch stacks them; images that come with boxes, as lists of both.

    Such images differ in size and in how many boxes they have, and torchvision's detectors take lists.
    """
    if all(isinstance(i, (tuple, list)) and len(i) == 2 and _has_boxes(i[1]) for i in items):
        return [list(column) for column in zip(*items, strict=True)]
    return default_collate(list(items))


def _has_boxes(target: Any) -> bool:
    return isinstance(target, Mapping) and "boxes" in target


def images_in(args: Sequence[Any]) -> int:
    """How many images (samples) one batch's arguments hold; 1 of a graph, which cannot be cut into its nodes.

    A graph is told by its edges: a table of whole numbers of another length, all below the number of nodes.
    """
    count = _length(args)
    return 1 if count and any(_counts_rows(t, count) for t in pytree.tree_leaves(args)) else count


def _counts_rows(value: Any, count: int) -> bool:
    if not isinstance(value, Tensor) or value.dim() != 2 or len(value) in (1, count):
        return False
    whole_numbers = value.dtype in (torch.int32, torch.int64)
    return whole_numbers and (not value.numel() or int(value.max()) < count)


def _length(args: Sequence[Any]) -> int:
    for arg in args:
        if isinstance(arg, (list, Tensor)):
            return len(arg)
        if isinstance(arg, Mapping):
            return _length(tuple(arg.values()))
    return 1


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


def _split(item: Any, network: nn.Module | None = None) -> Batch:
    """One item of an iterable -> (args, labels)."""
    if isinstance(item, Tensor) or _are_images(item):
        return _args(item), None
    if isinstance(item, Mapping):
        labels = next((item[key] for key in _LABELS if key in item), None)
        args = _named(item, network)
        return args, _labels(labels, _length(args))
    if isinstance(item, list) and item and all(isinstance(one, Mapping) for one in item):
        return (item,), None
    if isinstance(item, (list, tuple)):
        if len(item) == 1:
            return _split(item[0], network)
        count = len(needed(network))
        if count > 1 and len(item) in (count, count + 1) and all(isinstance(part, Tensor) for part in item):
            args = tuple(_one(_args(part)) for part in item[:count])
            return args, None if len(item) == count else _labels(item[count], _length(args))
        if len(item) == 2:
            args = _named(item[0], network) if isinstance(item[0], Mapping) else _args(item[0])
            return args, _labels(item[1], _length(args))
        raise DataError(
            f"a batch of data is {_described(item)}; expected x, (x, y) or ((x, lengths), y)", hint=_ACCEPTED
        )
    raise DataError(f"a batch of data is {_described(item)}", hint=_ACCEPTED)


def _named(batch: Mapping[str, Any], network: nn.Module | None) -> tuple[Any, ...]:
    """The arguments of a network's forward, in their order, by their names; else what has a usual name."""
    known = any(key in batch for key in _INPUTS)
    if network is None:
        return _args(batch)
    given, all_of_them = dict(batch), _parameters(network)
    parameters, without = [p for p in all_of_them if p.kind in _BY_POSITION], needed(network)
    taken = [p.name for p in parameters if p.name in given and p.name not in _LABELS]
    named = [p.name for p in all_of_them if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name in given]
    if named:
        raise DataError(
            f"{type(network).__name__} takes {', '.join(named)} by name alone, and batches go to it by position",
            hint="Leave the key out, or wrap the network in a module whose forward takes it among the others.",
        )
    if taken and without.issubset(given):
        until = max(i for i, p in enumerate(parameters) if p.name in taken or p.name in without)
        args = [given[p.name] if p.name in taken or p.name in without else p.default for p in parameters[: until + 1]]
        return tuple(_one(_args(arg)) if isinstance(arg, Tensor) and arg.dim() > 2 else arg for arg in args)
    return _args(batch) if known or len(without) != 1 else (dict(batch),)


def needed(network: nn.Module | None) -> set[str]:
    """The arguments that a network's forward cannot do without."""
    parameters = [p for p in _parameters(network) if p.kind in _BY_POSITION]
    return {p.name for p in parameters if p.default is inspect.Parameter.empty}


def _parameters(network: nn.Module | None) -> list[inspect.Parameter]:
    if network is None:
        return []
    try:
        return [*inspect.signature(network.forward).parameters.values()]
    except ValueError:  # a traced network's has no signature
        return []


_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _args(x: Any) -> tuple[Any, ...]:
    if isinstance(x, Tensor):
        if x.dim() == 0:
            raise DataError("a batch of data is a single number", hint=_ACCEPTED)
        if x.dtype == torch.uint8:
            raise DataError(
                "the images are uint8; a network takes floating values",
                hint="images / 255 for detectors, which normalise by themselves; else as the network was trained, for "
                "example (images / 255 - mean) / std.",
            )
        return (x,)
    if _are_images(x):
        return ([*map(_one, map(_args, x))],)
    if isinstance(x, Mapping):
        key = next((key for key in _INPUTS if key in x), None)
        if key is None:
            keys = ", ".join(repr(key) for key in x)
            raise DataError(f"a batch of data has the keys {keys}, none of which is known as the input", hint=_ACCEPTED)
        return _args(x[key])
    if isinstance(x, (list, tuple)) and x and all(isinstance(part, Tensor) for part in x):
        return tuple(_one(_args(part)) for part in x)
    raise DataError(f"the input in a batch of data is {_described(x)}", hint=_ACCEPTED)


def _one(args: tuple[Any, ...]) -> Any:
    return args[0]


def _are_images(x: Any) -> bool:
    """A list of single images, as torchvision's detectors take. A DataLoader's `[x, y]` is a list as well."""
    return (
        isinstance(x, (list, tuple))
        and len(x) > 0
        and all(isinstance(i, Tensor) and i.dim() == 3 and i.shape[0] in (1, 3, 4) for i in x)
    )


def _labels(y: Any, count: int) -> Tensor | None:
    """int64 `(N,)` if y holds one whole number for each sample, else None."""
    if isinstance(y, (list, tuple)) and y and all(isinstance(v, int) and not isinstance(v, bool) for v in y):
        y = torch.tensor(y)
    if not isinstance(y, Tensor) or y.shape != (count,):
        return None
    whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    return y.long() if whole else None


def _described(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        kinds = ", ".join(type(item).__name__ for item in value[:4])
        return f"a {type(value).__name__} of {len(value)} ({kinds}{', ...' if len(value) > 4 else ''})"
    return f"of type {type(value).__name__}"


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
