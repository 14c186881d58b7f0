"""Pictures of coloured shapes, with boxes and masks: data to train detectors on where there is none to download."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..arguments import whole
from ..errors import OptionError, OutputError
from ..files.writing import atomic
from .coco_masks import pycocotools_mask, rle_of

NAMES = ("circle", "square", "triangle")
MOST = 4
_EMPTY = 0.1  # the share of images without objects, which every detector has to survive
_RADIUS = (0.1, 0.22)  # half of an object's size, as a share of the image's
_TRIES = 30
_CONTRAST = 0.45

Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class Shapes(Dataset[tuple[Tensor, dict[str, Any]]]):
    """What `shapes` returns; image `i` is the same for the same size, classes and seed, however many there are."""

    count: int
    size: int = 128
    classes: int = len(NAMES)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("size", 16), ("classes", 1), ("seed", 0)):
            whole(name, getattr(self, name), least=least)
        if self.classes > len(NAMES):
            raise OptionError(f"there are {len(NAMES)} classes of shapes ({', '.join(NAMES)}), not {self.classes}")

    @property
    def categories(self) -> tuple[str, ...]:
        """The name of label 1, 2, ...; label 0 is the background."""
        return NAMES[: self.classes]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        if not -self.count <= index < self.count:
            raise IndexError(index)
        index %= self.count
        rng = np.random.default_rng([self.seed, index])
        picture, masks, labels = _drawn(rng, self.size, self.classes)
        target = {
            "boxes": torch.tensor([_box(m) for m in masks], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.from_numpy(np.array(masks, dtype=np.uint8).reshape(-1, self.size, self.size)),
            "image_id": index + 1,
        }
        # Rounded to 8 bits, so that an image read back from a PNG is the same.
        return torch.from_numpy(np.rint(picture * 255).astype(np.float32) / np.float32(255)), target


def shapes(count: int, size: int = 128, classes: int = len(NAMES), seed: int = 0) -> Shapes:
    """Images of filled circles, squares and triangles on textured noise, with their boxes and masks. Drawn on demand.

    Each image holds 1 to 4 objects in random colours that stand out from the background, none covering another; one
    image in ten holds none. An item is `(image, target)` in the convention of torchvision's detectors. image: float32
    `(3, size, size)` in [0, 1]; boxes: float32 `(n, 4)`, x1, y1, x2, y2 in pixels, around what is visible; labels:
    int64 `(n,)` from 1; masks: uint8 `(n, size, size)`; image_id: an int from 1.

    Raises OptionError for numbers that make no sense.
    """
    return Shapes(count, size, classes, seed)


def write_shapes(
    folder: str | os.PathLike[str],
    count: int,
    size: int = 128,
    classes: int = len(NAMES),
    seed: int = 0,
) -> Path:
    """Write what `shapes` draws as files: `images/*.png`, `annotations.json` (COCO), `masks/*.png`. Returns the folder.

    A mask's pixels are labels, 0 being the background. `open_coco` and `open_masks` read the folder.
    Raises OutputError when the folder holds something already or cannot be written, OptionError as `shapes`, and
    NormswapError without pycocotools, which writes the masks.
    """
    data, folder = Shapes(count, size, classes, seed), Path(folder)
    pycocotools_mask()  # its error, if it is missing, comes before anything is written
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputError(f"{folder} is not empty", hint="Name a new folder.")
        (folder / "images").mkdir(parents=True)
        (folder / "masks").mkdir()
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        image, target = data[index]
        name = f"{index + 1:06d}.png"
        _save_png(folder / "images" / name, (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        _save_png(folder / "masks" / name, semantic_mask(target, size).numpy())
        images.append({"id": target["image_id"], "file_name": name, "width": size, "height": size})
        annotations += _annotations(target, len(annotations) + 1)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(data.categories)]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    with atomic(folder / "annotations.json") as temporary:
        temporary.write_text(text, "utf-8")
    return folder


def semantic_mask(target: dict[str, Any], size: int) -> Tensor:
    """One label for each pixel, uint8 `(size, size)`, from a target's masks; 0 where there is no object."""
    labels = torch.zeros(size, size, dtype=torch.uint8)
    for mask, label in zip(target["masks"], target["labels"], strict=True):
        labels[mask.bool()] = int(label)
    return labels


def _annotations(target: dict[str, Any], first_id: int) -> list[dict[str, Any]]:
    found = []
    for number, (box, label) in enumerate(zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)):
        x1, y1, x2, y2 = box
        mask = target["masks"][number]
        found.append({
            "id": first_id + number, "image_id": target["image_id"], "category_id": label, "iscrowd": 0,
            "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(mask.sum()), "segmentation": rle_of(mask),
        })  # fmt: skip
    return found


def _save_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    from PIL import Image

    with atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


# --- drawing ------------------------------------------------------------------------------------------------------


def _drawn(rng: np.random.Generator, size: int, classes: int) -> tuple[Floats, list[Bits], list[int]]:
    """The picture `(3, size, size)`, and each object's visible pixels and label."""
    picture, colour = _background(rng, size)
    masks: list[Bits] = []
    labels: list[int] = []
    wanted = 0 if rng.random() < _EMPTY else int(rng.integers(1, MOST + 1))
    for _ in range(_TRIES):
        if len(masks) == wanted:
            break
        label = int(rng.integers(1, classes + 1))
        mask = _shape(rng, label, size)
        if any((mask & other).any() for other in masks):
            continue
        paint = _contrasting(rng, colour).reshape(3, 1) + rng.normal(0, 0.03, (3, int(mask.sum())))
        picture[:, mask] = paint
        masks.append(mask)
        labels.append(label)
    return picture.clip(0, 1), masks, labels


def _background(rng: np.random.Generator, size: int) -> tuple[Floats, Floats]:
    """Coarse and fine noise around a colour, and that colour."""
    colour = rng.uniform(0.2, 0.8, 3)
    coarse = torch.from_numpy(rng.normal(0, 0.08, (1, 3, 8, 8)))
    blurred = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)[0].numpy()
    return colour.reshape(3, 1, 1) + blurred + rng.normal(0, 0.05, (3, size, size)), colour


def _contrasting(rng: np.random.Generator, colour: Floats) -> Floats:
    """A random colour that differs from another: at most 1/2 of the colours are refused, so the loop ends."""
    while True:
        other = rng.uniform(0, 1, 3)
        if np.linalg.norm(other - colour) >= _CONTRAST:
            return other


def _shape(rng: np.random.Generator, label: int, size: int) -> Bits:
    """The pixels of one shape that lies wholly inside the image."""
    radius = rng.uniform(*_RADIUS) * size
    x0, y0 = rng.uniform(radius, size - radius, 2)
    y, x = np.mgrid[:size, :size] + 0.5
    dx, dy = np.abs(x - x0), y - y0
    if label == 1:
        inside = dx**2 + dy**2 <= radius**2
    elif label == 2:
        inside = np.maximum(dx, np.abs(dy)) <= 0.9 * radius
    else:  # standing on its base
        inside = (dy <= radius) & (2 * dx <= dy + radius)
    return np.asarray(inside)


def _box(mask: Bits) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
