"""Detection data in the COCO format: an annotation file and a folder of images -> images and targets."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from .box_data import BoxData, gathered
from .coco_annotations import check_boxes, check_links, check_masks, tables_of
from .coco_masks import pycocotools_mask

CocoData = BoxData
"""What `BoxData` was called while COCO's was the only format."""


def open_coco(annotations: str | os.PathLike[str], folder: str | os.PathLike[str], *, masks: bool = False) -> BoxData:
    """Read a COCO annotation file; `folder` is where its `file_name`s begin. Reads no image yet.

    Category ids, which may have gaps, become labels 1, 2, ... in rising order (0 is the background of torchvision's
    detectors). Boxes are clipped to the image; boxes of zero size and crowds are left out; `notes` says how many.
    Images without objects stay. masks: targets get masks, from polygons or run lengths, compressed or not.

    Raises DataError, naming the file and up to 10 offenders, for what is not JSON or not COCO, ids that are given
    twice or refer to nothing, boxes that are not four numbers, missing segmentations, and missing image files; and
    NormswapError for masks without pycocotools.
    """
    if masks:
        pycocotools_mask()  # its error, if it is missing, comes before the first image is read
    file, folder = Path(annotations), Path(folder)
    tables = tables_of(file)
    images = {entry["id"]: entry for entry in tables["images"]}
    categories = sorted((entry["id"], str(entry["name"])) for entry in tables["categories"])
    check_links(file, tables["annotations"], images, dict(categories))
    check_boxes(file, tables["annotations"])
    check = partial(check_masks, file) if masks else lambda kept: None
    return gathered(file, folder, tables["images"], tables["annotations"], categories, masks=masks, check=check)
