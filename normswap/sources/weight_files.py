"""One checkpoint file as it was saved: safetensors, or what `torch.save` wrote; memory-mapped where possible."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Fix, Text, WeightsError


def read_file(path: Path, trust_pickle: bool) -> Any:
    """What is in the file: tensors by name, or whatever a training script saved. Raises WeightsError."""
    check_readable(path)
    return _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path, trust_pickle)


def check_readable(path: Path) -> None:
    """Raise WeightsError for a file that is missing, empty, or that nobody may read."""
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except IsADirectoryError:
        raise WeightsError(
            f"{path} is a folder, not a checkpoint file",
            hint="A folder of weights holds model.safetensors, an index (*.index.json) of shards, or .metadata and "
            "*.distcp files.",
        ) from None
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if empty:
        raise WeightsError(f"{path} is empty")


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:9] == b"{" or path.suffix == ".safetensors"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a complete safetensors file: {error}") from error


def _read_pickle(path: Path, trust_pickle: bool) -> Any:
    with path.open("rb") as file:
        start = file.read(2)
    zipped = zipfile.is_zipfile(path)
    if start == b"PK" and not zipped:
        raise WeightsError(f"{path} is damaged: it begins like a torch checkpoint, but its end is missing")
    if not zipped and start[:1] != b"\x80":
        raise WeightsError(f"{path} is neither a safetensors nor a torch checkpoint")
    try:
        with warnings.catch_warnings():  # torch warns about what is said here as an error, or was trusted
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle, mmap=zipped)
    except (Exception, SystemExit) as error:  # damage shows in many ways, and trusted code raises whatever it likes
        if not trust_pickle and re.search(r"GLOBAL|[Uu]nsupported (operand|class)|TorchScript", str(error)):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise WeightsError(
                f"{path} holds pickled code{f' ({named[1]})' if named else ''}, which loading would run",
                hint=Text("If you trust where it comes from, pass ", Fix("trust_pickle", True), "."),
            ) from error
        way = "Code that it is pickled with has to be importable: PYTHONPATH names the folder that holds it."
        hint = way if isinstance(error, ModuleNotFoundError) else None
        raise WeightsError(f"{path} cannot be read as a torch checkpoint: {_first(error)}", hint=hint) from error


def _first(error: BaseException) -> str:
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # before it, advice on torch.load's arguments
    return (text or type(error).__name__).splitlines()[0][:200]
