"""The manifest of a file, or of shards, that normswap wrote: what it says, and that nobody has edited it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.record import Record
from ..errors import CheckpointError, WeightsError
from ..heads.classifier import Head
from ..sources.shards import ENDING, index_of, read_index, read_shards
from ..version import __version__
from .source_recovery import source_of
from .undo_tensors import undo_index

FORMAT = 1
KEY = "normswap"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a file that normswap wrote, checked. Raises CheckpointError."""
    path = Path(path)
    text = _text_of(path)
    try:
        manifest: dict[str, Any] = json.loads(text)
        version = manifest["format"]
        if isinstance(version, int) and version > FORMAT:
            raise CheckpointError(
                f"{path} has format {version}, this normswap {__version__} reads up to {FORMAT}",
                hint="install a newer normswap",
            )
        if manifest["sha256"] != digest(manifest):
            raise CheckpointError(f"the manifest of {path} was edited after normswap wrote it; it is not used")
        for name in ("source", "plan", "check", "history", "ties", "no_grad", "channels_last", "undo"):
            manifest[name]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the manifest of {path} is damaged: {type(error).__name__}: {error}") from error
    return manifest


def _text_of(path: Path) -> str:
    """The manifest as it stands in the file."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if (index := index_of(path)) is not None:
        text = _of_index(index).get(KEY)
    elif path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file", hint=f"One of shards holds an index (*{ENDING}).")
    else:
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(KEY)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error
    if text is None:
        raise CheckpointError(
            f"{path} was not written by normswap (it has no manifest)",
            hint=f"A plain checkpoint goes with its architecture: normswap convert SOURCE --weights {path}",
        )
    return str(text)


def _of_index(path: Path) -> Mapping[str, Any]:
    try:
        return read_index(path).metadata
    except WeightsError as error:
        raise CheckpointError(error.message, hint=error.hint) from error


def is_ours(path: str | Path) -> bool:
    """Whether the file is safetensors, or an index of shards or its folder, with a normswap manifest, sound or not."""
    from safetensors import SafetensorError, safe_open

    if (index := index_of(Path(path))) is not None:
        try:
            return KEY in read_index(index, complete=False).metadata
        except WeightsError:
            return False
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def make_manifest(
    model: nn.Module, record: Record, ties: Mapping[str, str], channels_last: list[str]
) -> dict[str, Any]:
    """What goes into the file's metadata, JSON values. ties: see `checkpoint`. channels_last: tensors that lie so."""
    source = record.source or source_of(model, record.plan, record.undo)
    manifest = {
        "format": FORMAT,
        "versions": {"normswap": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "source": source,
        "plan": record.plan.to_dict(),
        "check": asdict(record.check),
        "history": [entry.to_dict() for entry in record.history],
        "inputs": record.inputs,
        "head": None if (head := record.note(Head)) is None else head.to_dict(),
        "ties": dict(ties),
        "no_grad": [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad],
        "channels_last": channels_last,
        "undo": undo_index(record.undo),
    }
    manifest = json.loads(json.dumps(manifest))  # keys that are numbers become texts, as they will be when read
    return {**manifest, "sha256": digest(manifest)}


def digest(manifest: Mapping[str, Any]) -> str:
    """Tells an edited manifest; no protection against one made to deceive."""
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors. Raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = read_manifest(path)
    try:
        index = index_of(path)
        return manifest, load_file(path) if index is None else read_shards(index, trust_pickle=False)
    except WeightsError as error:
        raise CheckpointError(error.message, hint=error.hint) from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error
