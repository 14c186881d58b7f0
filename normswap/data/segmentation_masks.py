"""Semantic segmentation data: a folder of images and of masks whose pixels are class numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError, listed, plural
from .decoding import Unreadable, decode, reason_of
from .image_files import EXTENSIONS
from .preprocess import Preprocess

IGNORED = 255
_SUFFIX = "_mask"
_LAYOUT = "Give a folder with images/ and masks/, or one with NAME_mask.png beside each image NAME."


@dataclass(frozen=True)
class MaskData(Dataset[tuple[Tensor, Tensor]]):
    """What `open_masks` returns.

    An item is `(image, mask)`. image: float32 `(3, H, W)` in [0, 1]; mask: int64 `(H, W)`, a class for each pixel,
    255 where there is none.
    """

    folder: Path
    files: tuple[Path, ...]
    masks: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __str__(self) -> str:
        return f"{self.folder}: {plural(len(self), 'image')} with masks"

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Raises DataError for a file that cannot be read."""
        file, mask = self.files[index], self.masks[index]
        try:
            return self.read(index)
        except Unreadable as error:
            raise DataError(f"{file} or its mask {mask} cannot be read: {error}", hint="Replace them.") from None

    def chosen(self, indices: Sequence[int]) -> MaskData:
        """A part of them."""
        files, masks = (tuple(column[i] for i in indices) for column in (self.files, self.masks))
        return replace(self, files=files, masks=masks)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """The same, but raises `Unreadable`."""
        return Preprocess.raw()(decode(self.files[index])), _mask(self.masks[index])

    def count_classes(self) -> int:
        """One more than the highest class in any mask. Reads all of them; raises DataError, naming those it cannot."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(_highest, self.masks))
        _refuse_pairs(self.folder, "masks cannot be read", [
            f"{mask.relative_to(self.folder)}: {highest}"
            for mask, highest in zip(self.masks, found, strict=True) if isinstance(highest, str)
        ])  # fmt: skip
        return 1 + max(highest for highest in found if isinstance(highest, int))


def open_masks(folder: str | os.PathLike[str]) -> MaskData:
    """List images and their masks: `images/NAME.*` with `masks/NAME.png`, or `NAME.*` with `NAME_mask.png` beside it.

    A mask has one channel (grey, or a palette, whose indices count), each pixel being a class from 0, or 255 where it
    is to be ignored. Looks at the size of every file; decodes none.

    Raises DataError, naming up to 10 files, for images without a mask, masks without an image, pairs of different
    sizes, files that are no images, and masks in colour.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}", hint=_LAYOUT)
    images, masks = _by_name(folder)
    if not images and not masks:
        raise DataError(f"there are no images with masks in {folder}", hint=_LAYOUT)
    _refuse_pairs(folder, "images have no mask", [images[n].name for n in sorted(images.keys() - masks.keys())])
    _refuse_pairs(folder, "masks have no image", [masks[n].name for n in sorted(masks.keys() - images.keys())])
    names = sorted(images)
    problems = [problem for name in names if (problem := _misfit(images[name], masks[name]))]
    _refuse_pairs(folder, "images and masks do not go together", problems)
    return MaskData(folder, tuple(images[name] for name in names), tuple(masks[name] for name in names))


def _by_name(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and masks by the name they share."""
    if (folder / "images").is_dir() and (folder / "masks").is_dir():
        images, masks = _files(folder / "images"), _files(folder / "masks")
    else:
        files = _files(folder)
        masks = [file for file in files if file.stem.endswith(_SUFFIX)]
        images = [file for file in files if not file.stem.endswith(_SUFFIX)]
    by_name: dict[str, Path] = {}
    for file in images:
        if file.stem in by_name:
            raise DataError(f"{by_name[file.stem]} and {file} have the same name, so the mask of neither is known")
        by_name[file.stem] = file
    return by_name, {file.stem.removesuffix(_SUFFIX): file for file in masks}


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in EXTENSIONS and not f.name.startswith("."))


def _misfit(image: Path, mask: Path) -> str:
    """What is wrong with a pair, from the files' headers; empty when nothing is."""
    from PIL import Image

    sizes = []
    for file in (image, mask):
        try:
            with Image.open(file) as opened:
                sizes.append(opened.size)
                mode = opened.mode
        except Exception as error:  # as in `decode`
            return f"{file.name}: {reason_of(error, file)}"
    if sizes[0] != sizes[1]:
        (w, h), (mw, mh) = sizes
        return f"{image.name} is {w} x {h}, its mask {mask.name} {mw} x {mh}"
    return "" if _single(mode) else f"{mask.name} is in colour ({mode}); a mask has one channel of class numbers"


def _single(mode: str) -> bool:
    return mode in ("1", "L", "P") or mode.startswith("I")


def _mask(file: Path) -> Tensor:
    """int64 `(H, W)`. Raises Unreadable."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            values = np.asarray(opened)
    except Exception as error:  # as in `decode`
        raise Unreadable(reason_of(error, file)) from error
    return torch.from_numpy(values.astype(np.int64))


def _highest(file: Path) -> int | str:
    """The highest class in a mask, -1 if all of it is ignored; or why it cannot be read."""
    try:
        mask = _mask(file)
    except Unreadable as error:
        return str(error)
    classes = mask[mask != IGNORED]
    return int(classes.max()) if len(classes) else -1


def _refuse_pairs(folder: Path, what: str, problems: Sequence[str]) -> None:
    if problems:
        raise DataError(listed(f"{folder}: {len(problems)} {what}:", problems), hint=_LAYOUT)
