"""Reading images, boxes and masks; what `data=` takes. The names here are public."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import as_batches as as_batches
    from .box_data import BoxData as BoxData
    from .coco import CocoData as CocoData
    from .coco import open_coco as open_coco
    from .image_folder import ImageBatches as ImageBatches
    from .image_folder import ImageData as ImageData
    from .image_folder import open_images as open_images
    from .preprocess import Preprocess as Preprocess
    from .segmentation_masks import MaskData as MaskData
    from .segmentation_masks import open_masks as open_masks
    from .synthetic_shapes import Shapes as Shapes
    from .synthetic_shapes import shapes as shapes
    from .synthetic_shapes import write_shapes as write_shapes
    from .voc import open_voc as open_voc
    from .yolo import open_yolo as open_yolo

_HOME = {
    "as_batches": "batches",
    "BoxData": "box_data",
    "CocoData": "coco",
    "ImageBatches": "image_folder",
    "ImageData": "image_folder",
    "MaskData": "segmentation_masks",
    "Preprocess": "preprocess",
    "Shapes": "synthetic_shapes",
    "open_coco": "coco",
    "open_images": "image_folder",
    "open_masks": "segmentation_masks",
    "open_voc": "voc",
    "open_yolo": "yolo",
    "shapes": "synthetic_shapes",
    "write_shapes": "synthetic_shapes",
}

__all__ = [
    "BoxData",
    "CocoData",
    "ImageBatches",
    "ImageData",
    "MaskData",
    "Preprocess",
    "Shapes",
    "as_batches",
    "open_coco",
    "open_images",
    "open_masks",
    "open_voc",
    "open_yolo",
    "shapes",
    "write_shapes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
