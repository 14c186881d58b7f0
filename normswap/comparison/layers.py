"""Run two networks side by side and add up how far each layer's output is from the other's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.convert import back_in_order
from ..conversion.record import record_of
from ..data.batches import CHECK_IMAGES, placed, rows
from ..data.one_batch import Batch, images_in
from ..errors import DataError, Fix, Text, first_line, plural
from ..inspection.inventory import inspect
from ..modules.tree import aliases, device_and_dtype, module_at
from .outputs import Deviation, floating

MEMORY = 2**30
"""Bytes of layer outputs held at a time; larger batches run in parts."""


@dataclass(frozen=True)
class Difference:
    """One layer's or output's difference over all images.

    error: `|a - b| / |a|`, the norms taken over all values of all images at once; infinite if a value is NaN or
    infinite in one network alone, `|a - b|` where a is all zeros. max_abs: the largest single `|a - b|`.
    """

    path: str
    error: float
    max_abs: float


def comparable_paths(a: nn.Module, b: nn.Module) -> list[str]:
    """Layers whose outputs mean the same in both networks, in traversal order of a.

    These are the norms, but for those whose gamma and beta went into what reads them, and the convolutions and linear
    layers that nothing was folded into, nor centred. Without a
    conversion's record on either network, every layer that feeds a norm may have been folded into.
    """
    records = [record for model in (a, b) if (record := record_of(model)) is not None]
    steps = [step for record in records for step in record.plan.steps]
    norms = [*inspect(a, feeds=not records).layers, *inspect(b, feeds=False).layers]
    folded = {path for step in steps for path in step.producers} | {p for norm in norms for p in norm.feed.producers}
    folded |= {each.parameter.rpartition(".")[0] for record in records for each in record.plan.centred}
    bare = {name for step in steps if step.readers for name in (step.path, *step.aliases)}
    wanted = {name for step in steps for name in (step.path, *step.aliases)}
    wanted |= {name for norm in norms for name in (norm.path, *norm.aliases)}
    names_a, known_b = aliases(a), {name for names in aliases(b).values() for name in names}
    weighted = (nn.modules.conv._ConvNd, nn.Linear)
    paths = []
    for module, names in names_a.items():
        is_layer = isinstance(module, weighted) and folded.isdisjoint(names)
        is_norm = not wanted.isdisjoint(names) and bare.isdisjoint(names)
        if (is_layer or is_norm) and "" not in names and names[0] in known_b:
            paths.append(names[0])
    return paths


class LayerTally:
    """Runs two networks on a batch and adds up how far each layer's output is from the other's.

    Inside the hook, because what follows often changes the tensor in place; a layer called several times in one
    forward is compared call by call.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = list(paths)
        self.sums: dict[str, Deviation] = {}
        self.uneven: set[str] = set()

    def run(self, a: nn.Module, b: nn.Module, args: tuple[Any, ...]) -> tuple[Any, Any]:
        """The two outputs."""
        held: dict[str, list[Tensor]] = {}
        first_order, second_order = back_in_order(a), back_in_order(b)

        def keep(path: str, out: Tensor) -> None:
            held.setdefault(path, []).append(first_order(path, out).clone())

        def compare(path: str, out: Tensor) -> None:
            out = second_order(path, out)
            waiting = held.get(path)
            other = waiting.pop(0) if waiting else None
            if other is None or other.shape != out.shape:
                self.uneven.add(path)
            else:
                self.sums[path].add(other, out)

        first = _run(a, args, self.paths, keep, "first")
        for path in held:
            self.sums.setdefault(path, Deviation())
        second = _run(b, args, self.paths, compare, "second")
        self.uneven.update(path for path, left in held.items() if left)
        return first, second

    def differences(self, *, without: str | None = None) -> tuple[Difference, ...]:
        """In the order in which the first network runs the layers."""
        return tuple(
            Difference(path, total.relative, total.largest)
            for path, total in self.sums.items()
            if path not in self.uneven and not (without and f".{without}." in f".{path}.")
        )


def _run(
    model: nn.Module, args: tuple[Any, ...], paths: Iterable[str], see: Callable[[str, Tensor], None], which: str
) -> Any:
    def hook_for(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.is_floating_point():
                see(path, out)

        return hook

    with ExitStack() as stack:
        for path in paths:
            stack.callback(module_at(model, path).register_forward_hook(hook_for(path)).remove)
        try:
            return model(*placed(args, *device_and_dtype(model)))
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"a batch of {plural(images_in(args), 'image')} does not fit in memory",
                hint=Text("Try a smaller ", Fix("batch_size"), "."),
            ) from error
        except Exception as error:  # whatever a forward raises on inputs it was not made for
            raise DataError(
                f"the {which} network ({type(model).__name__}) cannot run on the data "
                f"({type(error).__name__}: {first_line(error)})",
                hint=CHECK_IMAGES,
            ) from error


def images_at_once(model: nn.Module, args: tuple[Any, ...], paths: Iterable[str]) -> int:
    """How many images' layer outputs fit in the memory set aside for them, going by a single image."""
    count = images_in(args)
    if count == 1:
        return 1
    size = 0

    def weigh(path: str, out: Tensor) -> None:
        nonlocal size
        size += out.numel() * out.element_size()

    try:
        out = _run(model, next(parts(args, None, 1))[0], paths, weigh, "first")
    except DataError:  # some networks squeeze a batch of one away
        return count
    size += sum(t.numel() * t.element_size() for t in floating(out).values())
    return max(1, MEMORY // max(size, 1))


def parts(args: tuple[Any, ...], labels: Tensor | None, most: int) -> Iterator[Batch]:
    """A batch in even parts of at most `most` images; what does not count the images goes with every part."""
    count = images_in(args)
    if count <= most:
        yield args, labels
        return
    size = math.ceil(count / math.ceil(count / most))
    for start in range(0, count, size):
        yield (
            tuple(rows(value, slice(start, start + size), count) for value in args),
            None if labels is None else labels[start : start + size],
        )
