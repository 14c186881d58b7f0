"""Data sets of `torchvision.datasets`, by their names."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError, Fix, OptionError, Text, did_you_mean
from .loader import Transform
from .splits import Sets, classes_of, split


@dataclass(frozen=True)
class TorchvisionSubset:
    """A torchvision data set, or a part of it, with a transform of its PIL images."""

    data: Any
    indices: tuple[int, ...] | None = None
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.data) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.data[index if self.indices is None else self.indices[index]]
        return (image if self.transform is None else self.transform(image)), int(label)


def from_torchvision(name: str, root: Path, *, download: bool, seed: int) -> Sets:
    """A data set of `torchvision.datasets` by its name, such as "CIFAR10", stored under `root`.

    Its own training and validation (or test) parts, or a split of it where it has none. Raises OptionError for an
    unknown name, and DataError when it is not there and cannot be fetched.
    """
    from torchvision import datasets

    known = {c.lower(): c for c in datasets.__all__ if isinstance(getattr(datasets, c), type)}
    if name.lower() not in known:
        near = did_you_mean(name, known.values())
        raise OptionError(
            f"torchvision has no data set {name!r}", hint=near or f"It has {', '.join(sorted(known.values()))}."
        )
    kind = getattr(datasets, known[name.lower()])
    parts = _parts_of(kind)
    opened = [_opened(kind, root, part, download) for part in parts]
    first = TorchvisionSubset(opened[0])
    if len(opened) == 2:
        return Sets(first, TorchvisionSubset(opened[1]), classes_of(opened[0]))
    labels = [int(y) for y in getattr(opened[0], "targets", None) or (y for _, y in opened[0])]
    kept, held = split(len(labels), seed, labels)
    note = f"{known[name.lower()]} has no validation part: {len(held)} of {len(labels)} images are held back"
    names = classes_of(opened[0]) or tuple(map(str, range(max(labels) + 1)))
    return Sets(TorchvisionSubset(opened[0], tuple(kept)), TorchvisionSubset(opened[0], tuple(held)), names, note)


def _parts_of(kind: type) -> list[dict[str, Any]]:
    """Arguments that open the training and the validation part."""
    parameters = inspect.signature(kind).parameters
    if "train" in parameters:
        return [{"train": True}, {"train": False}]
    if "split" in parameters:
        text = inspect.getsource(kind)
        second = next((s for s in ("val", "valid", "test") if f'"{s}"' in text), "test")
        return [{"split": "train"}, {"split": second}]
    return [{}]


def _opened(kind: type, root: Path, part: dict[str, Any], download: bool) -> Any:
    parameters = inspect.signature(kind).parameters
    arguments = dict(part)
    if "root" in parameters:
        arguments["root"] = str(root)
    if "download" in parameters:
        arguments["download"] = download
    try:
        return kind(**arguments)
    except Exception as error:  # missing files, no network, a package it needs
        where = f" under {root}" if "root" in arguments else ""
        hint = (
            Text(Fix("download", True), " fetches it.")
            if "download" in parameters and not download
            else "Put its files there."
        )
        raise DataError(f"{kind.__name__} cannot be opened{where}: {str(error).splitlines()[0]}", hint=hint) from error
