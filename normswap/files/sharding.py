"""Tensors in several files with an index, as Hugging Face lays them out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Fix, OptionError, OutputError, Text
from .folders import atomic_folder
from .writing import apart, full_disk

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
_UNITS = {"": 1, "B": 1} | {
    unit: base**power
    for power, letter in enumerate("KMGT", 1)
    for unit, base in ((f"{letter}B", 1000), (f"{letter}IB", 1024))
}


def parse_size(size: int | str) -> int:
    """A number of bytes, given as one or as "500MB", "2GB" (thousands) or "2GiB" (1024s). Raises OptionError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Z]*)\s*", str(size).upper())
    count = 0 if match is None or match[2] not in _UNITS else int(float(match[1]) * _UNITS[match[2]])
    if count < 1 or isinstance(size, bool):
        raise OptionError(Text(Fix("max_shard_size"), f" needs a size such as 500MB, 2GB or 2GiB, got {size!r}"))
    return count


def write_shards(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], max_size: int) -> None:
    """Write tensors, from any device, to the folder `path`, in the order given, each file up to `max_size` bytes.

    metadata goes into the index. One file's tensors are held at a time, not more. Raises OutputError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from .spilling import release  # with torch, which parsing a size does without

    release()  # what the run of the network has left
    parts = _parts({name: tensor.nbytes for name, tensor in tensors.items()}, max_size)
    places: dict[str, str] = {}
    try:
        with atomic_folder(path) as folder:
            for i, names in enumerate(parts, 1):
                file = folder / f"model-{i:05}-of-{len(parts):05}.safetensors"
                save_file(apart({name: tensors[name] for name in names}), file, metadata={"format": "pt"})
                places |= dict.fromkeys(names, file.name)
                release()
            total = sum(tensor.nbytes for tensor in tensors.values())
            index = {"metadata": {"total_size": total, **metadata}, "weight_map": places}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    except SafetensorError as error:
        raise OutputError(f"{path} cannot be written: {full_disk(str(error)) or error}") from error


def _parts(sizes: Mapping[str, int], max_size: int) -> list[list[str]]:
    """Names in as many parts as it takes, in their order; what is larger than a part is one by itself."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > max_size:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts
