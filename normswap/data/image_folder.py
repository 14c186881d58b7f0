"""A folder of images -> batches: class subfolders (labelled) or images alone (unlabelled)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ..arguments import whole
from ..errors import DataError, Fix, Text, listed, plural
from .decoding import Unreadable, decode
from .image_files import boxed_images, check_usable, files_in
from .preprocess import Preprocess, eight_bit

if TYPE_CHECKING:
    from PIL.Image import Image

_LOOK_AHEAD = 2000  # how many files more are tried once one is unreadable, so as to report them together

Transform = Callable[["Image"], Tensor]


@dataclass(frozen=True)
class ImageData:
    """The images of a folder, in the order of torchvision's `ImageFolder` (sorted by class, then by path).

    labels: one number for each of `files`, an index into `classes`; both are None when the folder has no classes.
    found: how many images the folder holds, of which `files` may be a selection.
    """

    folder: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None
    found: int = 0

    def __len__(self) -> int:
        return len(self.files)

    def __str__(self) -> str:
        count = f"{len(self.files)} of " * (len(self.files) < self.found) + plural(self.found, "image")
        classes = f" in {len(self.classes)} class{'es' * (len(self.classes) != 1)}" if self.classes else ", no labels"
        return f"{self.folder}: {count}{classes}"

    def batches(
        self, transform: Transform | None = None, batch_size: int = 64, *, stack: bool = True, max_bad: int = 0
    ) -> ImageBatches:
        """Batches of `(images, labels)`; may be iterated any number of times, and reads the files each time.

        images: float32 `(N, C, H, W)`, or a list of `(C, H, W)` with stack=False (what torchvision's detectors take).
        labels: int64 `(N,)`, or None. transform: a `Preprocess` (the default one if None), or a callable that takes a
        PIL image in mode RGB and returns a tensor `(C, H, W)`, such as `weights.transforms()`. max_bad: so many images
        that cannot be read are left out of their batches, and named in `ImageBatches.bad`.

        While iterating, raises DataError for images that cannot be read, named and counted, for images of different
        sizes with stack=True, and for a transform that fails.
        """
        whole("batch_size", batch_size)
        whole("max_bad", max_bad, least=0)
        return ImageBatches(self, transform or Preprocess(), batch_size, stack, max_bad)


@dataclass(frozen=True)
class ImageBatches:
    """What `ImageData.batches` returns; its length is the number of batches.

    bad: the images that could not be read and were left out, with the reason, as iterating has found them.
    """

    data: ImageData
    transform: Transform
    batch_size: int
    stack: bool
    max_bad: int = 0
    bad: list[str] = field(default_factory=list, compare=False)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes that the labels count."""
        return self.data.classes

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, Tensor | None]]:
        data, size = self.data, self.batch_size
        transform = self._settled()
        # Decoding releases the interpreter's lock: threads read the next batch while the network is at work.
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            coming = [pool.submit(_load, file, transform) for file in data.files[:size]]
            for start in range(0, len(data), size):
                batch = coming
                coming = [pool.submit(_load, file, transform) for file in data.files[start + size : start + 2 * size]]
                read = self._read(batch, start, pool)
                if read:
                    images, files = list(read.values()), [data.files[i] for i in read]
                    labels = None if data.labels is None else torch.tensor([data.labels[i] for i in read])
                    yield (_stacked(images, files) if self.stack else images), labels
        finally:
            pool.shutdown(cancel_futures=True)

    def _settled(self) -> Transform:
        """With the size "auto" decided once, so that one odd image does not get another size than the rest."""
        if not isinstance(self.transform, Preprocess) or self.transform.size != "auto":
            return self.transform
        # An unreadable file is reported with all others when its turn comes.
        sizes = (_size(file) for file in self.data.files[:_LOOK_AHEAD])
        size = next((s for s in sizes if s is not None), None)
        return self.transform if size is None else self.transform.settled(*size)

    def _read(self, batch: list[Future[Tensor]], start: int, pool: ThreadPoolExecutor) -> dict[int, Tensor]:
        """The images of a batch by their place among the files, without those that cannot be read."""
        found = {}
        for i, future in enumerate(batch, start):
            try:
                found[i] = future.result()
            except Unreadable as error:
                name = self._named(self.data.files[i], str(error))
                if name not in self.bad:
                    if len(self.bad) == self.max_bad:
                        self._refuse(start, pool)
                    self.bad.append(name)
        return found

    def _named(self, file: Path, reason: str) -> str:
        return f"{_short(file, self.data.folder)}: {reason}"

    def _refuse(self, start: int, pool: ThreadPoolExecutor) -> NoReturn:
        files = self.data.files
        stop = min(len(files), start + _LOOK_AHEAD)
        later = [self._named(*p) for p in pool.map(_problem, files[start:stop]) if p is not None]
        names = list(dict.fromkeys([*self.bad, *later]))
        looked_at = f"{stop}" if stop == len(files) else f"the first {stop}"
        summary = f"{len(names)} of {looked_at} images in {self.data.folder} cannot be read:"
        raise DataError(
            listed(summary, names),
            hint=Text("Remove or replace them, or skip them: ", Fix("max_bad", len(names)), "."),
        ) from None


def open_images(folder: str | os.PathLike[str], *, limit: int | None = None, seed: int = 0) -> ImageData:
    """List the images of a folder: one subfolder for each class, or images alone. Reads none of them.

    limit: take at most so many, spread evenly over the classes, chosen at random by `seed`, always the same ones.
    Of images with boxes, in the formats of COCO, YOLO or Pascal VOC, the images are taken, without labels.
    Names that begin with a dot are left out. Links to folders are followed, each real folder once.

    Raises DataError, saying what was found instead, when the folder does not hold images in one of the two ways, and
    OptionError for a limit below 1.
    """
    if limit is not None:
        whole("the number of images", limit)
    folder = Path(folder)
    here, below = files_in(folder)
    if not here and (boxed := boxed_images(folder, below)):
        here, below = boxed, {}
    filled = {name: files for name, files in below.items() if files}
    check_usable(folder, here, below, filled)
    if here:
        chosen = spread_over_classes([0] * len(here), limit, seed)
        return ImageData(folder, tuple(here[i] for i in chosen), found=len(here))
    files = [file for listed in filled.values() for file in listed]
    labels = [label for label, listed in enumerate(filled.values()) for _ in listed]
    chosen = spread_over_classes(labels, limit, seed)
    return ImageData(
        folder, tuple(files[i] for i in chosen), tuple(labels[i] for i in chosen), tuple(filled), found=len(files)
    )


def spread_over_classes(labels: Sequence[int], limit: int | None, seed: int = 0) -> list[int]:
    """Indices of `limit` items in rising order: by turns the next of each class, in a random order within the class."""
    if limit is None or limit >= len(labels):
        return list(range(len(labels)))
    generator = random.Random(seed)
    key = [generator.random() for _ in labels]
    turn = [0] * len(labels)
    taken: dict[int, int] = {}
    for i in sorted(range(len(labels)), key=key.__getitem__):
        turn[i] = taken[labels[i]] = taken.get(labels[i], 0) + 1
    return sorted(sorted(range(len(labels)), key=lambda i: (turn[i], key[i]))[:limit])


def _size(file: Path) -> tuple[int, int] | None:
    try:
        return decode(file).size
    except Unreadable:
        return None


def _problem(file: Path) -> tuple[Path, str] | None:
    try:
        decode(file)
    except Unreadable as error:
        return file, str(error)
    return None


def _load(file: Path, transform: Transform) -> Tensor:
    image = decode(file)
    try:
        x = transform(image if isinstance(transform, Preprocess) else eight_bit(image))
    except Exception as error:  # a stranger's callable
        raise DataError(f"the transform failed on {file}: {type(error).__name__}: {error}") from error
    if not isinstance(x, Tensor) or x.dim() != 3:
        got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise DataError(f"the transform returned {got} for {file}; expected a tensor (C, H, W)")
    return x


def _stacked(images: list[Tensor], files: Sequence[Path]) -> Tensor:
    for image, file in zip(images, files, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"images of different sizes cannot form a batch: {files[0].name} is {tuple(images[0].shape)}, "
                f"{file.name} is {tuple(image.shape)}",
                hint=Text("Give one size for all, such as ", Fix("size", 224), ", or ", Fix("batch_size", 1), "."),
            )
    return torch.stack(images)


def _short(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder))
