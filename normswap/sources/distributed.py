"""Weights in a folder of torch.distributed.checkpoint: `.metadata` and `*.distcp`, as FSDP training writes them."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError, first_line
from ..files.spilling import room

METADATA = ".metadata"
_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
}
_DESCRIPTIONS = "torch.distributed.checkpoint.metadata"


def is_distributed(path: Path) -> bool:
    """Whether a folder is one of torch.distributed.checkpoint."""
    return os.path.isdir(path) and ((path / METADATA).is_file() or any(path.glob("*.distcp")))


def read_distributed(path: Path, wanted: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The network's tensors, put together from what each process wrote.

    wanted: picks a state dict out of all that was saved, nested as it was, with tensors on the meta device; optimizer
    states are then never read. Nothing of the folder is unpickled but tensors and their descriptions. Raises
    WeightsError.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    described = _described(path)
    picked = wanted(_nested(described))
    keys = {id(meta): key for key, (meta, _) in described.items()}
    state = {name: room(meta.shape, meta.dtype) for name, meta in picked.items()}
    by_key = {keys[id(meta)]: state[name] for name, meta in picked.items()}
    try:
        with warnings.catch_warnings():  # that there is one process, as it should be
            warnings.simplefilter("ignore")
            load(by_key, storage_reader=FileSystemReader(path), no_dist=True)
    except (Exception, CheckpointException) as error:  # a file that is missing or cut off shows in many ways
        raise WeightsError(f"{path} is damaged, or not all of its files are there: {_cause(error)}") from error
    return state


def _described(path: Path) -> dict[str, tuple[Tensor, tuple[Any, ...]]]:
    """By key, each tensor without its values, and where it stood in what was saved."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        with (path / METADATA).open("rb") as file:
            metadata = _Descriptions(file).load()
        tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        places = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
        return {
            key: (torch.empty(one.size, dtype=one.properties.dtype, device="meta"), tuple(places.get(key, (key,))))
            for key, one in tensors.items()
        }
    except FileNotFoundError:
        raise WeightsError(
            f"{path} has no {METADATA}, which says what its .distcp files hold",
            hint="It is written last; a checkpoint without it is not complete.",
        ) from None
    except OSError as error:
        raise WeightsError(f"{path / METADATA} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damage shows in many ways
        raise WeightsError(f"{path / METADATA} cannot be read: {type(error).__name__}: {first_line(error)}") from error


class _Descriptions(pickle.Unpickler):
    """Unpickles what describes tensors, and nothing that could run other code."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        described = module == _DESCRIPTIONS and getattr(found, "__module__", "") == _DESCRIPTIONS
        if described or (module, name) in _NAMES or (module == "torch" and isinstance(found, torch.dtype)):
            return found
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no description of tensors")


def _nested(described: Mapping[str, tuple[Tensor, tuple[Any, ...]]]) -> dict[Any, Any]:
    """The tensors in dicts within dicts, as they were given to `save`."""
    root: dict[Any, Any] = {}
    for meta, place in described.values():
        inner = root
        for part in place[:-1]:
            inner = inner.setdefault(part, {})
        inner[place[-1]] = meta
    return root


def _cause(error: BaseException) -> str:
    """What torch says of the first failure in its report of all processes'."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {first_line(error)}"
