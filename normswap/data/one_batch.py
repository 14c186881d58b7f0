"""One batch of any form -> forward's arguments, and labels where there are some."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import DataError

Batch = tuple[tuple[Any, ...], Tensor | None]
_INPUTS = ("pixel_values", "pixel_values_videos", "image", "images", "input", "inputs", "x", "data", "video", "img")
_LABELS = ("label", "labels", "target", "targets", "y", "class", "fine_label")
ACCEPTED = (
    "data takes a tensor (N, C, H, W), a pair of it and labels (N,), a Dataset, a DataLoader or another iterable of "
    "batches, or a folder; a batch is a tensor, (x, y), (x, lengths) or (x, lengths, y) for a forward that takes both, "
    "a dict with a key such as 'pixel_values' or 'image', or with those of the forward's arguments, or a list of "
    "images (C, H, W)"
)


@dataclass(frozen=True)
class Forward:
    """What a network's forward takes, without the network: what worker processes need to read its batches."""

    name: str
    parameters: tuple[inspect.Parameter, ...]

    @classmethod
    def of(cls, network: nn.Module) -> Forward:
        """Without annotations, whose types need not go to another process."""
        plain = (p.replace(annotation=inspect.Parameter.empty) for p in _parameters(network))
        return cls(type(network).__name__, tuple(plain))


Taker = nn.Module | Forward | None


def split(item: Any, network: Taker = None, inputs: int | None = None, *, labelled: bool = False) -> Batch:
    """One item of an iterable -> (args, labels).

    inputs: how many arguments the caller is known to give the network. labelled: the last of several parts that the
    network can do without is y.
    """
    count = arguments_in(item, network, inputs, labelled=labelled) if isinstance(item, (list, tuple)) and item else 1
    certain = len(needed(network)) > 1 or (inputs or 0) > 1
    if isinstance(item, Tensor) or (_are_images(item) and (count < 2 or not (certain or _one_is_whole(item)))):
        return _args(item), None
    if isinstance(item, Mapping):
        labels = next((item[key] for key in _LABELS if key in item), None)
        args = _named(item, network)
        return args, labels_of(labels, _length(args))
    if isinstance(item, list) and item and all(isinstance(one, Mapping) for one in item):
        return (item,), None
    if isinstance(item, (list, tuple)):
        if len(item) == 1:
            return split(item[0], network, inputs)
        if count > 1 and len(item) in (count, count + 1) and all(isinstance(part, Tensor) for part in item[:count]):
            args = tuple(_one(_args(part)) if part.dim() > 2 or part is item[0] else part for part in item[:count])
            return args, None if len(item) == count else labels_of(item[count], _length(args))
        if len(item) == 2:
            args = _named(item[0], network) if isinstance(item[0], Mapping) else _several(item[0], network)
            return args, labels_of(item[1], _length(args))
        raise DataError(f"a batch of data is {described(item)}; expected x, (x, y) or ((x, lengths), y)", hint=ACCEPTED)
    raise DataError(f"a batch of data is {described(item)}", hint=ACCEPTED)


def arguments_in(item: Sequence[Any], network: Taker, inputs: int | None = None, *, labelled: bool = False) -> int:
    """How many of a batch's parts are arguments of forward: those it needs, and what the others' names say goes with x.

    inputs: so many are known to be, wherever labels would not do as well. labelled: the last part is none of the
    arguments that forward can do without.
    """
    parameters = [p for p in _parameters(network) if p.kind in _BY_POSITION]
    if not parameters:
        return inputs or 0
    count = len(needed(network))
    for place in range(max(count, 1), min(len(item) - labelled, len(parameters))):
        if not _goes_with(item[0], parameters[place].name, item[place], told=place < (inputs or 0)):
            break
        count = place + 1
    return count


_LENGTHS = re.compile(r"(?<!wave)len(gth)?s?(_|$)")
_NO_LENGTHS = re.compile(r"(^|_)(max|min|total)")


def named_lengths(name: str) -> bool:
    """Whether an argument of forward of that name is how long each sequence of a batch is: `lengths`, `x_lens`, ..."""
    name = name.lower()
    return bool(_LENGTHS.search(name)) and not _NO_LENGTHS.search(name) and not _named_labels(name)


def named_mask(name: str) -> bool:
    """Whether an argument of forward of that name says what of a batch counts: `mask`, `attention_mask`, ..."""
    return "mask" in name.lower() and not _named_labels(name)


def _named_labels(name: str) -> bool:
    return any(word in name.lower() for word in ("label", "target"))


def _goes_with(x: Any, name: str, part: Any, *, told: bool) -> bool:
    """Whether that is what the optional parameter `name` takes beside x, and no labels.

    Raises DataError for numbers that a parameter of lengths would be given, and that are no lengths of x.
    """
    if not (isinstance(x, Tensor) and isinstance(part, Tensor)) or _named_labels(name):
        return False
    if named_mask(name):  # one number for each sample masks nothing; one for each pixel is what segmentation learns
        pixels = x.dim() > 3 and part.shape[-2:] == x.shape[-2:]
        return part.dim() > 1 and (told or not pixels)
    if told:
        return name.lower() not in _LABELS
    if not named_lengths(name) or part.shape != x.shape[:1] or part.dtype == torch.bool:
        return False
    longest = max(x.shape[1:], default=0)
    if not part.is_floating_point() and part.numel() and not 1 <= int(part.min()) <= int(part.max()) <= longest:
        raise DataError(
            f"the second part of a batch is read as the {name} that forward takes, and holds numbers from "
            f"{int(part.min())} to {int(part.max())}, which are no lengths of x, {tuple(x.shape)}",
            hint=f"Labels go third, (x, {name}, y), or into a dict: {{'x': x, 'labels': y}}, with forward's own names; "
            f"lengths that count something else too: {{'x': x, '{name}': ...}}.",
        )
    return True


def _several(x: Any, network: Taker) -> tuple[Any, ...]:
    """The x of (x, y): a list of images of a network that takes one argument; its arguments, where it takes several."""
    together = isinstance(x, (list, tuple)) and len(x) == len(needed(network)) > 1
    return tuple(map(_one, map(_args, x))) if together else _args(x)


def _named(batch: Mapping[str, Any], network: Taker) -> tuple[Any, ...]:
    """The arguments of a network's forward, in their order, by their names; else what has a usual name."""
    known = any(key in batch for key in _INPUTS)
    if network is None:
        return _args(batch)
    given, all_of_them = dict(batch), _parameters(network)
    parameters, without = [p for p in all_of_them if p.kind in _BY_POSITION], needed(network)
    taken = [p.name for p in parameters if p.name in given and p.name not in _LABELS]
    named = [p.name for p in all_of_them if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name in given]
    if named:
        of = network.name if isinstance(network, Forward) else type(network).__name__
        raise DataError(
            f"{of} takes {', '.join(named)} by name alone, and batches go to it by position",
            hint="Leave the key out, or wrap the network in a module whose forward takes it among the others.",
        )
    if taken and without.issubset(given):
        until = max(i for i, p in enumerate(parameters) if p.name in taken or p.name in without)
        args = [given[p.name] if p.name in taken or p.name in without else p.default for p in parameters[: until + 1]]
        return tuple(_one(_args(arg)) if isinstance(arg, Tensor) and arg.dim() > 2 else arg for arg in args)
    return _args(batch) if known or len(without) != 1 else (dict(batch),)


def needed(network: Taker) -> set[str]:
    """The arguments that a network's forward cannot do without."""
    parameters = [p for p in _parameters(network) if p.kind in _BY_POSITION]
    return {p.name for p in parameters if p.default is inspect.Parameter.empty}


def _parameters(network: Taker) -> list[inspect.Parameter]:
    if network is None or isinstance(network, Forward):
        return [] if network is None else [*network.parameters]
    try:
        return [*inspect.signature(network.forward).parameters.values()]
    except ValueError:  # a traced network's has no signature
        return []


_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _args(x: Any) -> tuple[Any, ...]:
    if isinstance(x, Tensor):
        if x.dim() == 0:
            raise DataError("a batch of data is a single number", hint=ACCEPTED)
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
            raise DataError(f"a batch of data has the keys {keys}, none of which is known as the input", hint=ACCEPTED)
        return _args(x[key])
    if isinstance(x, (list, tuple)) and x and all(isinstance(part, Tensor) for part in x):
        return tuple(_one(_args(part)) for part in x)
    raise DataError(f"the input in a batch of data is {described(x)}", hint=ACCEPTED)


def _one(args: tuple[Any, ...]) -> Any:
    return args[0]


def _are_images(x: Any) -> bool:
    """A list of single images, as torchvision's detectors take. A DataLoader's `[x, y]` is a list as well."""
    return (
        isinstance(x, (list, tuple))
        and len(x) > 0
        and all(isinstance(i, Tensor) and i.dim() == 3 and i.shape[0] in (1, 3, 4) for i in x)
    )


def _one_is_whole(parts: Sequence[Tensor]) -> bool:
    """Whether a mask is among them, say, as which no images come."""
    return any(not part.is_floating_point() and part.dtype != torch.uint8 for part in parts)


def labels_of(y: Any, count: int) -> Tensor | None:
    """int64 `(N,)` if y holds one whole number for each sample, else None."""
    if isinstance(y, (list, tuple)) and y and all(isinstance(v, int) and not isinstance(v, bool) for v in y):
        y = torch.tensor(y)
    if not isinstance(y, Tensor) or y.shape != (count,):
        return None
    whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    return y.long() if whole else None


def described(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        kinds = ", ".join(type(item).__name__ for item in value[:4])
        return f"a {type(value).__name__} of {len(value)} ({kinds}{', ...' if len(value) > 4 else ''})"
    return f"of type {type(value).__name__}"


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
