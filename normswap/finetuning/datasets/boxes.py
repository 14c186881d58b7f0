"""What `data=` of a detector's fine-tuning accepts -> a training and a validation set with the same categories."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.box_data import BoxData, Picture
from ...data.decoding import Unreadable
from ...data.synthetic_shapes import Shapes
from ...errors import DataError, Fix, Text
from .box_folders import opened, single
from .splits import Sets, check_apart, held_note, held_out, sized, split

_CONVENTION = (
    "normswap.data.open_coco, open_yolo and open_voc read files into it; labels begin with 1, 0 being the background."
)


@dataclass(frozen=True)
class DetectionImages:
    """Images with boxes that normswap reads or draws itself. flip: mirror half of them, boxes and masks too."""

    data: BoxData | Shapes
    flip: bool = False

    def __len__(self) -> int:
        return len(self.data)

    @property
    def folder(self) -> Path:
        """Of the images, if they are files; otherwise an AttributeError, as for anything without files."""
        return self.data.folder  # type: ignore[union-attr]

    @property
    def files(self) -> tuple[Path, ...]:
        """The images, if they are files."""
        return tuple(self.folder / picture.name for picture in self.data.pictures)  # type: ignore[union-attr]

    @property
    def labels(self) -> tuple[Any, ...]:
        """Of each image, with its boxes; for pictures that are drawn, what they are drawn by."""
        if isinstance(self.data, Shapes):
            return (repr(self.data),)
        return tuple((p.labels, p.boxes) for p in self.data.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Raises `Unreadable` for an image that is broken, or has a mask that is."""
        if isinstance(self.data, Shapes):
            image, target = self.data[index]
        else:
            name = self.data.pictures[index].name
            try:
                image, target = self.data.read(index)
            except Unreadable as error:
                error.name = name
                raise
            except DataError as error:
                raise Unreadable(error.message, name) from error
        return flipped(image, target) if self.flip else (image, target)


def flipped(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Image `(C, H, W)`, boxes and masks mirrored together, or none of them, at even chances."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    size = (image.shape[-2], image.shape[-1])
    wrapped = {"boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)}
    if "masks" in target:
        wrapped["masks"] = tv_tensors.Mask(target["masks"])
    picture, changed = v2.RandomHorizontalFlip()(tv_tensors.Image(image), wrapped)
    return picture.as_subclass(Tensor), {**target, **{k: v.as_subclass(Tensor) for k, v in changed.items()}}


def open_boxes(data: Any, eval_data: Any = None, *, masks: bool = False, seed: int = 0) -> Sets:
    """Training data, and validation data if there is any. masks: read masks too.

    data: a folder (see `finetune`), a `BoxData` or `Shapes`, or a map-style Dataset in torchvision's convention;
    eval_data: likewise. Of a BoxData without validation data a tenth becomes that, always the same by `seed`.

    Raises DataError, saying what was found, for data that cannot be used.
    """
    train, validation = data, eval_data
    if isinstance(data, (str, os.PathLike)):
        train, found = opened(Path(data), masks)
        validation = found if eval_data is None else eval_data
    if isinstance(validation, (str, os.PathLike)):
        validation = single(Path(validation), masks)
    note: list[str] = []
    if isinstance(train, BoxData):
        note += train.notes
        _check_objects(train)
        if validation is None:
            train, validation, said = _split(train, seed)
            note.append(said)
        elif isinstance(validation, BoxData):
            note += [f"{validation.annotations.name}: {text}" for text in validation.notes]
            check_apart(*(DetectionImages(part).files for part in (train, validation)))
            validation = _aligned(train, validation)
    if isinstance(validation, BoxData):
        _check_objects(validation)
        validation = replace(validation, crowds=True)
    sets = [None if part is None else _set(name, part) for name, part in (("data", train), ("eval_data", validation))]
    classes = getattr(train, "categories", None)
    return Sets(sets[0], sets[1], tuple(map(str, classes)) if classes else None, "; ".join(note))


def open_one(data: Any, *, masks: bool = False) -> Sets:
    """One labelled set, to measure on, as both parts: the validation part of a folder that has two, else all of it.

    data: as in `open_boxes`. Raises DataError.
    """
    if isinstance(data, (str, os.PathLike)):
        data, held = opened(Path(data), masks, training=False)
        if held is not None:
            return held_out(open_boxes(data, held, masks=masks))
    notes: tuple[str, ...] = ()
    if isinstance(data, BoxData):
        _check_objects(data)
        notes, data = data.notes, replace(data, crowds=True)
    found, classes = _set("data", data), getattr(data, "categories", None)
    return Sets(found, found, tuple(map(str, classes)) if classes else None, "; ".join(notes))


def check_sample(image: Any, target: Any, classes: int) -> None:
    """Raise DataError for what torchvision's detectors would fail on. classes: with the background."""
    if not isinstance(image, Tensor) or image.dim() != 3 or not image.is_floating_point():
        got = f"a {image.dtype} tensor {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise DataError(f"an image is {got}; a detector takes float (C, H, W) in [0, 1]", hint=_CONVENTION)
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= set(target):
        got = f"has the keys {', '.join(map(str, target))}" if isinstance(target, Mapping) else type(target).__name__
        raise DataError(f"a target {'' if isinstance(target, Mapping) else 'is '}{got}; it needs boxes and labels",
                        hint=_CONVENTION)  # fmt: skip
    boxes, labels = target["boxes"], target["labels"]
    if not isinstance(boxes, Tensor) or not isinstance(labels, Tensor):
        raise DataError(f"boxes and labels are {type(boxes).__name__} and {type(labels).__name__}, not tensors")
    name = f"image {target['image_id']}" if "image_id" in target else "an image"
    if boxes.shape != (len(labels), 4) or labels.dtype != torch.int64:
        raise DataError(
            f"{name} has boxes {tuple(boxes.shape)} and {labels.dtype} labels {tuple(labels.shape)}; expected (n, 4) "
            "and int64 (n,)",
            hint=_CONVENTION,
        )
    masks = target.get("masks")
    if masks is not None and tuple(masks.shape) != (len(labels), *image.shape[1:]):
        raise DataError(
            f"{name} is {tuple(image.shape)} with {len(labels)} objects; its masks are {tuple(masks.shape)}"
        )
    if not len(labels):
        return
    if not torch.isfinite(boxes).all() or (boxes[:, 2:] <= boxes[:, :2]).any():
        raise DataError(f"{name} has a box that is no x1 < x2, y1 < y2: {boxes.tolist()}", hint="Leave such boxes out.")
    low, high = int(labels.min()), int(labels.max())
    if low < 1 or high >= classes:
        raise DataError(
            f"{name} has labels from {low} to {high}, but the network knows 1 to {classes - 1}",
            hint=Text(Fix("num_classes", high + 1), " gives it a new head; 0 is the background."),
        )


# --- sets ----------------------------------------------------------------------------------------------------------


def _split(data: BoxData, seed: int) -> tuple[BoxData, BoxData | None, str]:
    count = len(data)
    if count < 2:
        return data, None, "a single image, so there is nothing to validate on"
    kept, held = split(count, seed, [bool(picture.boxes) for picture in data.pictures], DetectionImages(data).files)
    parts = [replace(data, pictures=tuple(data.pictures[i] for i in part)) for part in (kept, held)]
    return parts[0], parts[1], held_note(len(held), count, seed)


def _aligned(train: BoxData, validation: BoxData) -> BoxData:
    """With the training data's labels; categories are told by their names."""
    if validation.categories == train.categories:
        return validation
    unknown = [name for name in validation.categories if name not in train.categories]
    if unknown:
        raise DataError(
            f"{validation.annotations} has categories that {train.annotations} lacks: {', '.join(unknown[:10])}",
            hint="Both parts need the same categories.",
        )
    number = {i + 1: train.categories.index(name) + 1 for i, name in enumerate(validation.categories)}
    pictures = tuple(_relabelled(p, number) for p in validation.pictures)
    return replace(validation, pictures=pictures, categories=train.categories, category_ids=train.category_ids)


def _relabelled(picture: Picture, number: Mapping[int, int]) -> Picture:
    crowds = None if picture.crowds is None else _relabelled(picture.crowds, number)
    return replace(picture, labels=tuple(number[label] for label in picture.labels), crowds=crowds)


def _check_objects(data: BoxData) -> None:
    if not any(p.boxes for p in data.pictures):
        raise DataError(f"none of the {len(data)} images of {data.annotations} has an object")


def _set(name: str, data: Any) -> Any:
    if isinstance(data, (BoxData, Shapes)):
        return DetectionImages(data)
    return sized(name, data, "Give a folder, a BoxData, or a Dataset with __len__ and __getitem__.")
