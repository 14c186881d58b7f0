"""Weights in several files: shards and an index that says which tensor is in which, as Hugging Face lays them out."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import WeightsError, listed
from .weight_files import check_readable, read_file

ENDING = ".index.json"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"-\d+-of-(\d+)\.\w+$")
WHOLE = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Index:
    """An index of shards. shards: names of tensors by file, in the index's order. metadata: what else it says."""

    path: Path
    shards: Mapping[Path, list[str]]
    metadata: Mapping[str, Any]


def index_of(path: Path) -> Path | None:
    """The index, if `path` is one or a folder with one; None for anything else."""
    if not os.path.isdir(path):
        return path if path.name.endswith(ENDING) else None
    known = [path / name for name in INDEXES if (path / name).is_file()]
    return next(iter(known or sorted(path.glob(f"*{ENDING}"))), None)


def whole_file(path: Path) -> Path:
    """The file of a folder that holds all weights in one, by the name that Hugging Face gives it; else `path`."""
    if os.path.isdir(path) and index_of(path) is None:
        return next((path / name for name in WHOLE if (path / name).is_file()), path)
    return path


def one_of_several(file: Path) -> str | None:
    """What to give in place of a file that is, by its name, one shard of several; None for any other."""
    shard = _SHARD.search(file.name)
    if shard is None or int(shard[1]) < 2:
        return None
    index = index_of(file.parent)
    way = f"give {index} or its folder" if index else f"give the folder with all of them and their index (*{ENDING})"
    return f"{file.name} is one of {int(shard[1])} files of one checkpoint: {way}."


def read_index(path: Path, *, complete: bool = True) -> Index:
    """Read an index. Raises WeightsError for one that is damaged, or names shards elsewhere or (complete) not there."""
    check_readable(path)
    try:
        said = json.loads(path.read_text("utf-8"))
        places = {str(name): str(file) for name, file in said["weight_map"].items()}
        metadata = dict(said.get("metadata") or {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is no index of shards: {type(error).__name__}: {error}") from error
    if not places:
        raise WeightsError(f"{path} names no tensors")
    shards: dict[Path, list[str]] = defaultdict(list)
    for name, file in places.items():
        if not file or Path(file).name != file:
            raise WeightsError(f"{path} names the shard {file!r}, which is not a file beside it")
        shards[path.with_name(file)].append(name)
    missing = [file.name for file in shards if not file.is_file()]
    if missing and complete:
        summary = f"{path} names {len(shards)} shards, of which {len(missing)} are missing:"
        raise WeightsError(listed(summary, missing), hint="Copy or download them into the folder of the index.")
    return Index(path, shards, metadata)


def read_shards(path: Path, trust_pickle: bool) -> dict[str, Tensor]:
    """The tensors that an index names. Raises WeightsError, naming the shard that does not hold what it should."""
    found: dict[str, Tensor] = {}
    for file, names in read_index(path).shards.items():
        loaded = read_file(file, trust_pickle)
        held = loaded if isinstance(loaded, Mapping) else {}
        absent = [name for name in names if not isinstance(held.get(name), Tensor)]
        if absent:
            summary = f"{file} lacks {len(absent)} of {len(names)} tensors that {path.name} says it holds:"
            raise WeightsError(listed(summary, absent), hint="Shards and index are of different checkpoints.")
        found |= {name: held[name] for name in names}
    return found
