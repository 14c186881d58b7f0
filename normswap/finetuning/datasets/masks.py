"""What `data=` of a segmentation network's fine-tuning accepts, and random changes of image and mask together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...arguments import one_of
from ...choices import AUGMENTS
from ...data.decoding import Unreadable
from ...data.preprocess import Preprocess
from ...data.segmentation_masks import IGNORED, MaskData, open_masks
from ...errors import DataError, OptionError
from .splits import TRAIN, VALIDATION, Sets, check_apart, held_note, held_out, part_of, sized, split

_SCALES = (0.5, 2.0)
_LARGEST = 480


@dataclass(frozen=True)
class SegmentationImages:
    """Images and masks from files, normalised and resized as `prepare` says. changes: one of `choices.AUGMENTS`.

    The shorter side becomes that of `prepare.resize` or `prepare.size`, if they are numbers; masks are resized only in
    training, so that validation is at their own size. "flip" mirrors half of the images; "auto" also scales them by
    0.5 to 2 and cuts a random piece of the size `crop` out, ignored pixels where there is no image, as torchvision's
    reference does.
    """

    data: MaskData
    prepare: Preprocess = field(default_factory=Preprocess)
    changes: str = "none"
    crop: tuple[int, int] = (_LARGEST, _LARGEST)
    training: bool = False

    def __len__(self) -> int:
        return len(self.data)

    @property
    def folder(self) -> Path:
        """Of the images and masks."""
        return self.data.folder

    @property
    def files(self) -> tuple[Path, ...]:
        """The images."""
        return self.data.files

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Raises `Unreadable` for an image or a mask that is broken."""
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        try:
            image, mask = self.data.read(index)
        except Unreadable as error:
            error.name = str(self.data.files[index].relative_to(self.data.folder))
            raise
        resize = v2.Resize(self._size(*image.shape[1:]))
        normalize = v2.Normalize(list(self.prepare.mean), list(self.prepare.std))
        if not self.training:
            return normalize(resize(image)), mask
        changes = [resize, *[v2.RandomHorizontalFlip()] * (self.changes != "none"), normalize]
        if self.changes == "auto":
            nothing: dict[Any, int] = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
            changes.append(v2.RandomCrop(self.crop, pad_if_needed=True, fill=nothing))
        image, mask = v2.Compose(changes)(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        side = _side(self.prepare)
        scale = 1.0 if side is None else side / min(height, width)
        if self.training and self.changes == "auto":
            low, high = _SCALES
            scale *= low + (high - low) * float(torch.rand(()))
        return max(1, round(height * scale)), max(1, round(width * scale))


def open_mask_sets(data: Any, eval_data: Any = None, *, seed: int = 0) -> Sets:
    """Training data, and validation data if there is any.

    data: a folder that `open_masks` reads, or with `train` and `val` folders of such; a `MaskData`; or a map-style
    Dataset of (image, mask). eval_data: likewise. Without validation data a tenth of the files becomes that, always
    the same by `seed`. Raises DataError for data that cannot be used.
    """
    train, validation = data, eval_data
    if isinstance(data, (str, os.PathLike)):
        folder = Path(data)
        first = part_of(folder, TRAIN)
        train = open_masks(first or folder)
        second = part_of(folder, VALIDATION) if first is not None and eval_data is None else None
        validation = second if second is not None else eval_data
    if isinstance(validation, (str, os.PathLike)):
        validation = open_masks(validation)
    note, names = "", None
    if isinstance(train, MaskData):
        highest = [d.count_classes() for d in (train, validation) if isinstance(d, MaskData)]
        if max(highest) < 1:
            raise DataError(f"all pixels of the masks in {train.folder} are ignored ({IGNORED})")
        names = tuple(f"class {i}" for i in range(max(highest)))
        if isinstance(validation, MaskData):
            check_apart(train.files, validation.files)
        if validation is None and len(train) > 1:
            count = len(train)
            kept, held = split(count, seed, files=train.files)
            train, validation = train.chosen(kept), train.chosen(held)
            note = held_note(len(held), count, seed)
    sets = [None if part is None else _set(name, part) for name, part in (("data", train), ("eval_data", validation))]
    return Sets(sets[0], sets[1], names, note)


def open_one(data: Any) -> Sets:
    """One labelled set, to measure on, as both parts: the validation part of a folder that has two, else all of it.

    data: as in `open_mask_sets`. Raises DataError.
    """
    if isinstance(data, (str, os.PathLike)):
        train, held = (part_of(Path(data), names) for names in (TRAIN, VALIDATION))
        data = open_masks(data if train is None or held is None else held)
        if train is not None and held is not None:
            return held_out(Sets(None, _set("data", data)))
    found = _set("data", data)
    return Sets(found, found)


def prepared_masks(sets: Sets, preprocess: Callable[[Any], Tensor] | None, augment: str) -> Sets:
    """With changes of the training images, where they are files; crops have the size of `preprocess`, or up to 480."""
    one_of("augment", augment, AUGMENTS)
    prepare = _checked(preprocess)
    train, validation = (
        replace(s, prepare=prepare) if isinstance(s, SegmentationImages) else s for s in (sets.train, sets.validation)
    )
    if isinstance(train, SegmentationImages):
        train = replace(train, changes=augment, training=True, crop=_crop(train.data, prepare))
    return replace(sets, train=train, validation=validation)


def plain(data: Any, preprocess: Callable[[Any], Tensor] | None) -> Any:
    """The same set without random changes."""
    return replace(data, prepare=_checked(preprocess), changes="none") if isinstance(data, SegmentationImages) else data


def _checked(preprocess: Callable[[Any], Tensor] | None) -> Preprocess:
    if preprocess is None:
        return Preprocess()
    if not isinstance(preprocess, Preprocess) or preprocess.channels != 3:
        raise OptionError(
            "segmentation changes masks with their images, so preprocess must be a normswap.data.Preprocess in colour",
            hint="Preprocess(mean=..., std=...) gives the normalisation.",
        )
    return preprocess


def _side(prepare: Preprocess) -> int | None:
    """What the shorter side is resized to; None leaves images as they are."""
    if prepare.resize is not None:
        return prepare.resize if isinstance(prepare.resize, int) else min(prepare.resize)
    return None if isinstance(prepare.size, str) else min(prepare.size)


def _crop(data: MaskData, prepare: Preprocess) -> tuple[int, int]:
    if not isinstance(prepare.size, str):
        return prepare.size
    from PIL import Image

    with Image.open(data.files[0]) as first:  # `open_masks` has seen that it opens
        width, height = first.size
    side = _side(prepare)
    scale = 1.0 if side is None else side / min(height, width)
    return min(_LARGEST, round(height * scale)), min(_LARGEST, round(width * scale))


def _set(name: str, data: Any) -> Any:
    if isinstance(data, MaskData):
        return SegmentationImages(data)
    return sized(name, data, "Give a folder, a MaskData, or a Dataset with __len__ and __getitem__.")
