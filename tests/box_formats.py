"""The images and boxes of a COCO folder, written as YOLO and Pascal VOC have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

YAML = "names: [circle, square, triangle]\n"


def as_yolo(source: Path, place: Path, part: str = "train") -> Path:
    """As `images/PART` and `labels/PART` with data.yaml; parts may be added to a folder one by one."""
    content, by_image = _read(source)
    images, labels = place / "images" / part, place / "labels" / part
    shutil.copytree(source / "images", images)
    labels.mkdir(parents=True)
    for entry in content["images"]:
        width, height = entry["width"], entry["height"]
        lines = []
        for a in by_image[entry["id"]]:
            x, y, w, h = a["bbox"]
            shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines.append(" ".join([str(a["category_id"] - 1), *map(str, shares)]))
        (labels / entry["file_name"]).with_suffix(".txt").write_text("".join(f"{line}\n" for line in lines))
    file = place / "data.yaml"
    file.write_text((file.read_text() if file.exists() else YAML) + f"{part}: images/{part}\n")
    return place


def as_voc(source: Path, place: Path, part: str = "train") -> Path:
    """As Annotations/, JPEGImages/ and ImageSets/Main/PART.txt; the names of the images begin with the part."""
    content, by_image = _read(source)
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    names = {c["id"]: c["name"] for c in content["categories"]}
    listed = []
    for entry in content["images"]:
        name = f"{part}-{Path(entry['file_name']).stem}"
        shutil.copy(source / "images" / entry["file_name"], place / "JPEGImages" / f"{name}.png")
        objects = []
        for a in by_image[entry["id"]]:
            x, y, w, h = a["bbox"]
            corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
            box = "".join(f"<{k}>{v:g}</{k}>" for k, v in corners.items())
            objects.append(f"  <object><name>{escape(names[a['category_id']])}</name><bndbox>{box}</bndbox></object>\n")
        size = f"<size><width>{entry['width']}</width><height>{entry['height']}</height><depth>3</depth></size>"
        text = f"<annotation>\n  <filename>{name}.png</filename>{size}\n{''.join(objects)}</annotation>\n"
        (place / "Annotations" / f"{name}.xml").write_text(text)
        listed.append(name)
    (place / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{name}\n" for name in listed))
    return place


def _read(source: Path) -> tuple[dict[str, Any], dict[int, list[dict[str, Any]]]]:
    content = json.loads((source / "annotations.json").read_text())
    by_image: dict[int, list[dict[str, Any]]] = {entry["id"]: [] for entry in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    return content, by_image
