"""What `data=` of a classifier's fine-tuning accepts -> a training and a validation set with the same classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...data.decoding import Unreadable, decode
from ...data.image_folder import ImageData, open_images
from ...data.one_batch import Taker
from ...errors import DataError, Fix, NormswapError, Text
from . import box_folders
from .augmentation import Plain, settled
from .batched import are_batches, batch_of, gathered, samples_of
from .collate import check_input
from .loader import Tensors, Transform, spread
from .splits import TRAIN, VALIDATION, Sets, check_apart, classes_of, held_note, held_out, part_of, sized, split
from .torchvision_named import TorchvisionSubset


@dataclass(frozen=True)
class LabelledImages:
    """Image files with labels, read when asked for; transform: PIL image -> float tensor `(C, H, W)`."""

    folder: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Raises `Unreadable` for a file that is no whole image."""
        file = self.files[index]
        try:
            image = decode(file)
        except Unreadable as error:
            error.name = str(file.relative_to(self.folder.parent))
            raise
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    @classmethod
    def of(cls, data: ImageData, numbers: Sequence[int]) -> LabelledImages:
        """numbers: the label that each class of `data` gets."""
        return cls(data.folder, data.files, tuple(numbers[label] for label in data.labels or ()))

    def chosen(self, indices: Sequence[int]) -> LabelledImages:
        """A part of them."""
        return replace(self, files=tuple(self.files[i] for i in indices), labels=tuple(self.labels[i] for i in indices))


PICTURES = (LabelledImages, TorchvisionSubset)
"""Sets that normswap reads itself, and may change at random."""


def open_sets(data: Any, eval_data: Any = None, *, seed: int = 0, network: Taker = None) -> Sets:
    """Read what the Python API accepts: training data, and validation data if there is any.

    data: a folder with one subfolder for each class, or with `train` and `val` folders of such; a pair of tensors
    `(N, *)` and int64 `(N,)`; a map-style Dataset whose items are (input, label), or what `batch_of` takes; a
    DataLoader, whose set and `collate_fn` are used; or batches of one size. eval_data: likewise. network: as
    `as_batches` has it. A single
    folder of classes is split, a tenth for validation, spread evenly over the classes, always the same by `seed`.

    Raises DataError, saying what was found, for data that cannot be used.
    """
    if isinstance(data, (str, os.PathLike)):
        if eval_data is not None and not isinstance(eval_data, (str, os.PathLike)):
            raise DataError(
                f"data is a folder and eval_data of type {type(eval_data).__name__}", hint="Give folders for both."
            )
        with _boxes_told(Path(data)):
            return _folders(Path(data), None if eval_data is None else Path(eval_data), seed)
    second = None if eval_data is None else _set("eval_data", eval_data, network)
    return Sets(_set("data", data, network), second, classes_of(data))


def open_one(data: Any, network: Taker = None) -> Sets:
    """One labelled set, to measure on, as both parts: the validation part of a folder that has two, else all of it.

    data: as `open_sets` has it, or an `ImageData`. Raises DataError.
    """
    if isinstance(data, (str, os.PathLike)):
        if part_of(Path(data), TRAIN) is not None and part_of(Path(data), VALIDATION) is not None:
            return held_out(open_sets(data))
        with _boxes_told(Path(data)):
            data = _with_classes(open_images(data))
    if isinstance(data, ImageData):
        names = _with_classes(data).classes or ()
        pictures = LabelledImages.of(data, range(len(names)))
        return Sets(pictures, pictures, names)
    found = _set("data", data, network)
    return Sets(found, found, classes_of(data))


@contextmanager
def _boxes_told(place: Path) -> Iterator[None]:
    """Errors of what is within name the task, where images with boxes lie there."""
    try:
        yield
    except DataError as error:
        try:
            found = box_folders.found_in(place)
        except NormswapError:
            raise error from None
        raise DataError(
            error.message, hint=Text(f"Boxes lie there, in the format of {found}: ", Fix("task", "detection"), ".")
        ) from error


def transformed(sets: Sets, train: Transform, validation: Transform) -> Sets:
    """With these transforms of PIL images, where the sets are pictures in files."""
    pairs = ((sets.train, train), (sets.validation, validation))
    first, second = (replace(s, transform=t) if isinstance(s, PICTURES) else s for s, t in pairs)
    return replace(sets, train=first, validation=second)


def some_inputs(sets: Sets, prepare: Transform, count: int, batch_size: int, network: Taker = None) -> Iterator[Any]:
    """Batches `(N, C, H, W)` of up to `count` training images, spread over the whole set, without random changes.

    Of several arguments of the network's forward, or others than tensors, as a pair with None.
    """
    source = sets.train
    if isinstance(source, LabelledImages):
        prepare = settled(prepare, source.files)
    if isinstance(source, PICTURES):
        source = replace(source, transform=Plain(prepare))
    items = spread(source, count)
    while some := list(islice(items, batch_size)):
        inputs, _ = batch_of(some, network)
        yield inputs if isinstance(inputs, Tensor) else (inputs, None)


def _folders(folder: Path, evaluation: Path | None, seed: int) -> Sets:
    train = part_of(folder, TRAIN)
    if evaluation is None and train is not None:
        evaluation = part_of(folder, VALIDATION)
    first = _classed(train or folder)
    names = first.classes or ()
    if len(names) < 2:
        raise DataError(
            f"{first.folder} has a single class, {names[0]!r}, so there is nothing to tell apart",
            hint="Give a folder with one subfolder for each class.",
        )
    pictures = LabelledImages.of(first, range(len(names)))
    if evaluation is not None:
        second = _classed(evaluation)
        unknown = [name for name in second.classes or () if name not in names]
        if unknown:
            raise DataError(
                f"{second.folder} has classes that {first.folder} lacks: {', '.join(map(repr, unknown[:10]))}",
                hint="Add them to the training images, or take them out of the validation images.",
            )
        check_apart(first.files, second.files)
        numbers = [names.index(name) for name in second.classes or ()]
        note = "" if evaluation.name in VALIDATION[:3] else f"{evaluation} is what training is validated on"
        return Sets(pictures, LabelledImages.of(second, numbers), names, note)
    kept, held = split(len(pictures), seed, pictures.labels, pictures.files)
    if not held:
        note = "no class has two images, so that none is held back, and there is no validation"
        return Sets(pictures, None, names, note)
    note = held_note(len(held), len(pictures), seed)
    return Sets(pictures.chosen(kept), pictures.chosen(held), names, note)


def _classed(folder: Path) -> ImageData:
    return _with_classes(open_images(folder))


def _with_classes(data: ImageData) -> ImageData:
    if data.classes is None:
        raise DataError(
            f"{data.folder} holds images without classes", hint="Labels are needed: one subfolder for each class."
        )
    return data


def _in_memory(data: Any, network: Taker) -> Any:
    """One set from batches; a DataLoader's own data set, whose order and batches finetune decides."""
    if isinstance(data, DataLoader):
        return samples_of(data)
    batches = list(data) if isinstance(data, Iterator) else data
    if are_batches(batches, network):
        return gathered([batches] if isinstance(batches, Mapping) else batches, network)
    return batches


def _set(name: str, data: Any, network: Taker) -> Any:
    """A map-style set of (input, label). Batches of such, that are no set of samples, are read into memory."""
    data = _in_memory(data, network)
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(hasattr(t, "shape") for t in data):
        inputs, labels = (torch.as_tensor(t) for t in data)
        if len(inputs) != len(labels) or labels.dim() != 1:
            raise DataError(f"{name} has {len(inputs)} inputs and labels of shape {tuple(labels.shape)}")
        if len(inputs) == 0:
            raise DataError(f"{name} holds no sample")
        if labels.is_floating_point() or int(labels.min()) < 0:
            raise DataError(f"the labels of {name} are not whole numbers from 0", hint="y.long()")
        check_input(inputs)
        return Tensors(inputs, labels.long())
    return sized(
        name,
        data,
        "Give a folder, a pair of tensors (inputs, labels), a Dataset with __len__ and __getitem__, or a "
        "DataLoader of such.",
    )
