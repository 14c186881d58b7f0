"""What `data=` of a classifier's fine-tuning accepts -> a training and a validation set with the same classes."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, OptionError
from ..images import ImageData, decode, open_images
from ..images import Unreadable as UnreadableImage
from .samples import Tensors, Unreadable, spread
from .transforms import Plain, settled

TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "test", "testing", "eval", "dev")
SHARE = 0.1
"""The part of a data set without a validation set that becomes one."""

Transform = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Sets:
    """Two data sets whose items are (input, label); `validation` may be None. note: what was decided for the user."""

    train: Any
    validation: Any
    classes: tuple[str, ...] | None = None
    note: str = ""

    def transformed(self, train: Transform, validation: Transform) -> Sets:
        """With these transforms of PIL images, where the sets are pictures in files."""
        sets = (self.train, self.validation)
        pairs = zip(sets, (train, validation), strict=True)
        new = (replace(s, transform=t) if isinstance(s, (Pictures, Named)) else s for s, t in pairs)
        first, second = new
        return replace(self, train=first, validation=second)

    @property
    def digest(self) -> str:
        """Tells other data: of names, numbers and labels, not of the pictures themselves."""
        what = []
        for data in (self.train, self.validation):
            names = getattr(data, "files", None)
            listed = None if names is None else [str(f.relative_to(data.folder)) for f in names]
            what.append([None if data is None else len(data), listed, getattr(data, "labels", None)])
        return hashlib.sha256(repr((self.classes, what)).encode()).hexdigest()[:16]

    @property
    def count(self) -> int | None:
        """How many classes there are, None where the data does not say."""
        return None if self.classes is None else len(self.classes)


@dataclass(frozen=True)
class Pictures:
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
        except UnreadableImage as error:
            raise Unreadable(str(file.relative_to(self.folder.parent)), str(error)) from error
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    @classmethod
    def of(cls, data: ImageData, numbers: Sequence[int]) -> Pictures:
        """numbers: the label that each class of `data` gets."""
        return cls(data.folder, data.files, tuple(numbers[label] for label in data.labels or ()))

    def chosen(self, indices: Sequence[int]) -> Pictures:
        """A part of them."""
        return replace(self, files=tuple(self.files[i] for i in indices), labels=tuple(self.labels[i] for i in indices))


def open_sets(data: Any, eval_data: Any = None, *, seed: int = 0) -> Sets:
    """Read what the Python API accepts: training data, and validation data if there is any.

    data: a folder with one subfolder for each class, or with `train` and `val` folders of such; a pair of tensors
    `(N, *)` and int64 `(N,)`; or a map-style Dataset whose items are (input, label). eval_data: likewise. A single
    folder of classes is split, a tenth for validation, spread evenly over the classes, always the same by `seed`.

    Raises DataError, saying what was found, for data that cannot be used.
    """
    if isinstance(data, (str, os.PathLike)):
        if eval_data is not None and not isinstance(eval_data, (str, os.PathLike)):
            raise DataError(
                f"data is a folder and eval_data of type {type(eval_data).__name__}", hint="Give folders for both."
            )
        return _folders(Path(data), None if eval_data is None else Path(eval_data), seed)
    return Sets(_set("data", data), None if eval_data is None else _set("eval_data", eval_data), _classes(data))


def some_inputs(sets: Sets, prepare: Transform, count: int, batch_size: int) -> Iterator[Tensor]:
    """Batches `(N, C, H, W)` of up to `count` training images, spread over the whole set, without random changes."""
    source = sets.train
    if isinstance(source, Pictures):
        prepare = settled(prepare, source.files)
    if isinstance(source, (Pictures, Named)):
        source = replace(source, transform=Plain(prepare))
    found: list[Tensor] = []
    for item in spread(source, count):
        found.append(torch.as_tensor(item[0]))
        if len(found) == batch_size:
            yield torch.stack(found)
            found = []
    if found:
        yield torch.stack(found)


def split(count: int, labels: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Indices of a training and a validation part; of every class with two samples or more both have one."""
    by_class: dict[int, list[int]] = {}
    for i in range(count):
        by_class.setdefault(labels[i], []).append(i)
    held: set[int] = set()
    for label, members in sorted(by_class.items()):
        random.Random(f"{seed} {label}").shuffle(members)
        held.update(members[: _held(len(members))])
    return [i for i in range(count) if i not in held], sorted(held)


def _held(members: int) -> int:
    return max(1, round(SHARE * members)) if members > 1 else 0


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
    pictures = Pictures.of(first, range(len(names)))
    if evaluation is not None:
        second = _classed(evaluation)
        unknown = [name for name in second.classes or () if name not in names]
        if unknown:
            raise DataError(
                f"{second.folder} has classes that {first.folder} lacks: {', '.join(map(repr, unknown[:10]))}",
                hint="Add them to the training images, or take them out of the validation images.",
            )
        numbers = [names.index(name) for name in second.classes or ()]
        note = "" if evaluation.name in VALIDATION[:3] else f"{evaluation} is what training is validated on"
        return Sets(pictures, Pictures.of(second, numbers), names, note)
    kept, held = split(len(pictures), pictures.labels, seed)
    if not held:
        note = "no class has two images, so that none is held back, and there is no validation"
        return Sets(pictures, None, names, note)
    note = f"no validation images: {len(held)} of the {len(pictures)} images are held back for it (seed {seed})"
    return Sets(pictures.chosen(kept), pictures.chosen(held), names, note)


def part_of(folder: Path, names: Sequence[str]) -> Path | None:
    """The subfolder with the first of these names that is there."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _classed(folder: Path) -> ImageData:
    data = open_images(folder)
    if data.classes is None:
        raise DataError(
            f"{folder} holds images without classes", hint="Training needs labels: one subfolder for each class."
        )
    return data


def _set(name: str, data: Any) -> Any:
    """A map-style set of (input, label)."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(hasattr(t, "shape") for t in data):
        inputs, labels = (torch.as_tensor(t) for t in data)
        if len(inputs) != len(labels) or labels.dim() != 1:
            raise DataError(f"{name} has {len(inputs)} inputs and labels of shape {tuple(labels.shape)}")
        if len(inputs) == 0:
            raise DataError(f"{name} holds no sample")
        if labels.is_floating_point() or int(labels.min()) < 0:
            raise DataError(f"the labels of {name} are not whole numbers from 0", hint="y.long()")
        _check_input(inputs)
        return Tensors(inputs, labels.long())
    return sized(
        name, data, "Give a folder, a pair of tensors (inputs, labels), or a Dataset with __len__ and __getitem__."
    )


def sized(name: str, data: Any, hint: str) -> Any:
    """A map-style set with something in it. Raises DataError."""
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or isinstance(data, (str, dict)):
        raise DataError(
            f"{name} is of type {type(data).__name__}, which has no order of its own to go on from", hint=hint
        )
    if len(data) == 0:
        raise DataError(f"{name} holds no sample")
    return data


def _classes(data: Any) -> tuple[str, ...] | None:
    names = getattr(data, "classes", None)
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) and names else None


def from_torchvision(name: str, root: Path, *, download: bool, seed: int) -> Sets:
    """A data set of `torchvision.datasets` by its name, such as "CIFAR10", stored under `root`.

    Its own training and validation (or test) parts, or a split of it where it has none. Raises OptionError for an
    unknown name, and DataError when it is not there and cannot be fetched.
    """
    from torchvision import datasets

    known = {c.lower(): c for c in datasets.__all__ if isinstance(getattr(datasets, c), type)}
    if name.lower() not in known:
        raise OptionError(f"torchvision has no data set {name!r}", hint=f"It has {', '.join(sorted(known.values()))}.")
    kind = getattr(datasets, known[name.lower()])
    parts = _parts_of(kind)
    opened = [_opened(kind, root, part, download) for part in parts]
    first = Named(opened[0])
    if len(opened) == 2:
        return Sets(first, Named(opened[1]), _classes(opened[0]))
    labels = [int(y) for y in getattr(opened[0], "targets", None) or (y for _, y in opened[0])]
    kept, held = split(len(labels), labels, seed)
    note = f"{known[name.lower()]} has no validation part: {len(held)} of {len(labels)} images are held back"
    names = _classes(opened[0]) or tuple(map(str, range(max(labels) + 1)))
    return Sets(Named(opened[0], tuple(kept)), Named(opened[0], tuple(held)), names, note)


def _parts_of(kind: type) -> list[dict[str, Any]]:
    """Arguments that open the training and the validation part."""
    import inspect

    parameters = inspect.signature(kind).parameters
    if "train" in parameters:
        return [{"train": True}, {"train": False}]
    if "split" in parameters:
        text = inspect.getsource(kind)
        second = next((s for s in ("val", "valid", "test") if f'"{s}"' in text), "test")
        return [{"split": "train"}, {"split": second}]
    return [{}]


def _opened(kind: type, root: Path, part: dict[str, Any], download: bool) -> Any:
    import inspect

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
        hint = "--download fetches it." if "download" in parameters and not download else "Put its files there."
        raise DataError(f"{kind.__name__} cannot be opened{where}: {str(error).splitlines()[0]}", hint=hint) from error


@dataclass(frozen=True)
class Named:
    """A torchvision data set, or a part of it, with a transform of its PIL images."""

    data: Any
    indices: tuple[int, ...] | None = None
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.data) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.data[index if self.indices is None else self.indices[index]]
        return (image if self.transform is None else self.transform(image)), int(label)


def collate(items: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
    """`(N, *)` and int64 `(N,)`. Raises DataError for inputs of different sizes or labels that are no numbers."""
    for item in items:
        if not (isinstance(item, (tuple, list)) and len(item) == 2):
            raise DataError(f"a sample is of type {type(item).__name__}", hint="A sample is a pair (input, label).")
    inputs = [_tensor(x) for x, _ in items]
    for x in inputs:
        if x.shape != inputs[0].shape:
            raise DataError(
                f"images of different sizes cannot form a batch: {tuple(inputs[0].shape)} and {tuple(x.shape)}",
                hint="Give a size for all: --size 224.",
            )
    return torch.stack(inputs), torch.tensor([_label(y) for _, y in items])


def _tensor(x: Any) -> Tensor:
    try:
        x = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"an input is of type {type(x).__name__}, not a tensor",
            hint="Let the Dataset turn it into a float tensor (C, H, W), normalised as the network was trained.",
        ) from None
    _check_input(x)
    return x


def _check_input(x: Tensor) -> None:
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
