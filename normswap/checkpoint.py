"""Save a converted network in one safetensors file with a manifest, and load it back on any machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .conversion import Record
from .errors import CheckpointError, NormswapError, OutputError, WeightsError
from .planning import Plan
from .recognise import source_of
from .selfcheck import Check
from .sources import Source, build_empty, build_full
from .surgery import get
from .transfer import apply
from .undo import LayerUndo, Undo
from .weights import check_finite, has_empty_parameters, load_state

FORMAT = 1
KEY = "normswap"
_UNDO = "normswap.undo."


def save(model: nn.Module, path: str | Path, *, overwrite: bool = True) -> Path:
    """Write a converted network and its manifest to `path`, a safetensors file. Returns the path.

    The file appears whole or not at all: it is written beside its place, synced, and renamed. Tied tensors are
    written once. Raises NormswapError for a model that normswap did not convert, OutputError when `path` cannot be
    written, or exists and overwrite is False.
    """
    record: Record | None = model.__dict__.get("_normswap")
    if record is None:
        raise NormswapError("only a network from normswap.convert or normswap.load can be saved", hint="Convert it first.")
    path = Path(path)
    check_writable(path, overwrite=overwrite)
    tensors, ties = _untied(model)
    manifest = _manifest(model, record, ties)
    tensors |= _undo_tensors(record.undo)
    _write(path, tensors, {"format": "pt", KEY: json.dumps(manifest)})
    return path


def save_state(model: nn.Module, path: str | Path, *, overwrite: bool = True) -> Path:
    """Write any network's state dict to `path`, a plain safetensors file without a manifest. Returns the path.

    For what `revert` gives back: `load_state_dict(safetensors.torch.load_file(path))` and `--weights` read it. Tied
    tensors are written under each of their names. Whole or not at all, with the errors of `save`.
    """
    path = Path(path)
    check_writable(path, overwrite=overwrite)
    tensors, ties = _untied(model)
    _write(path, tensors | {alias: tensors[name].clone() for alias, name in ties.items()}, {"format": "pt"})
    return path


def load(
    path: str | Path, model: nn.Module | None = None, *, trust_code: bool = False, allow_nonfinite: bool = False
) -> nn.Module:
    """Rebuild a network that `save` wrote: its architecture, the swap, and the weights. Returned in eval mode.

    model: the original architecture, for one that only its caller can build; it is converted in place and returned.
    trust_code: run the factory that the manifest names, which is code of whoever wrote the file.

    Raises CheckpointError for a file that is missing, damaged, not normswap's, of a newer version, or edited;
    SourceError or WeightsError when its architecture cannot be rebuilt or does not fit.
    """
    manifest, tensors = _read(Path(path))
    plan = Plan.from_dict(manifest["plan"])
    undo_tensors = {k: tensors.pop(k) for k in list(tensors) if k.startswith(_UNDO)}
    for alias, name in manifest["ties"].items():
        tensors[alias] = tensors[name]
    if not allow_nonfinite:
        check_finite(tensors, path)
    if model is None:
        source = _trusted_source(manifest, path, trust_code)
        root, undo = _swapped(build_empty(source), plan, tensors, path)
        if has_empty_parameters(root):  # values that no state dict holds
            root, undo = _swapped(build_full(source), plan, tensors, path)
    else:
        root, undo = _swapped(model, plan, tensors, path)
    _retie(root, manifest["ties"])
    _fill_undo(undo, undo_tensors, manifest["undo"])
    root.__dict__["_normswap"] = Record(plan, undo, Check(**manifest["check"]), manifest["source"], list(manifest["history"]))
    return root.eval()


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a file that normswap wrote, checked. Raises CheckpointError."""
    return _read_manifest(Path(path))


def is_ours(path: str | Path) -> bool:
    """Whether the file is safetensors with a normswap manifest, sound or not."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError, before any work is done, when a result cannot go to `path`."""
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder", hint=f"Give a file name, such as {path / 'model.safetensors'}.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already", hint="--force (overwrite=True) replaces it; -o names another file.")
    if not folder.is_dir():
        raise OutputError(f"the folder {folder} does not exist" if not folder.exists() else f"{folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {folder} is not writable")


# --- manifest ---------------------------------------------------------------------------------------------------


def _manifest(model: nn.Module, record: Record, ties: Mapping[str, str]) -> dict[str, Any]:
    source = record.source or source_of(model, record.plan, record.undo)
    manifest = {
        "format": FORMAT,
        "versions": {"normswap": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "source": source,
        "plan": record.plan.to_dict(),
        "check": asdict(record.check),
        "history": record.history,
        "ties": dict(ties),
        "undo": _undo_index(record.undo),
    }
    return {**manifest, "sha256": _digest(manifest)}


def _digest(manifest: Mapping[str, Any]) -> str:
    """Tells an edited manifest; no protection against one made to deceive."""
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file")
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
    try:
        manifest = json.loads(text)
        version = manifest["format"]
        if isinstance(version, int) and version > FORMAT:
            raise CheckpointError(
                f"{path} has format {version}, this normswap {__version__} reads up to {FORMAT}",
                hint="pip install --upgrade normswap",
            )
        if manifest["sha256"] != _digest(manifest):
            raise CheckpointError(f"the manifest of {path} was edited after normswap wrote it; it is not used")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the manifest of {path} is damaged: {type(error).__name__}: {error}") from error
    return manifest


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = _read_manifest(path)
    try:
        return manifest, load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error


def _trusted_source(manifest: Mapping[str, Any], path: str | Path, trust_code: bool) -> Source:
    if manifest["source"] is None:
        raise CheckpointError(
            f"{path} does not know how to build its architecture",
            hint=f'Build the original network and pass it: normswap.load("{path}", model=my_model)',
        )
    source = Source.from_dict(manifest["source"])
    if source.runs_code and not trust_code:
        raise CheckpointError(
            f"{path} is built by {source}, and building it would run that code",
            hint="If you trust the file, pass --trust-code (trust_code=True), or pass the network with model=.",
        )
    return source


# --- tensors ----------------------------------------------------------------------------------------------------


def _untied(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each tensor once, and `alias -> name` for the others."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    by_view: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        storage = tensor.untyped_storage().data_ptr() if not tensor.is_meta else 0
        view = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.is_meta:
            raise NormswapError(f"{name} is on the meta device and has no values to save")
        if tensor.numel() and view in by_view:
            ties[name] = by_view[view]
            continue
        by_view[view] = name
        shares = storage in storages and tensor.numel() > 0
        storages.add(storage)
        tensors[name] = tensor.clone() if shares else tensor.contiguous()
    return tensors, ties


def _retie(root: nn.Module, ties: Mapping[str, str]) -> None:
    """Make names that held one tensor when saved hold one again."""
    for alias, name in ties.items():
        (owner, leaf), (source, source_leaf) = (_owner(root, n) for n in (alias, name))
        for table in ("_parameters", "_buffers"):
            if leaf in owner.__dict__[table] and source_leaf in source.__dict__[table]:
                owner.__dict__[table][leaf] = source.__dict__[table][source_leaf]


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return get(root, path), leaf


def _swapped(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], path: str | Path) -> tuple[nn.Module, Undo]:
    """The original architecture with the swap done and the values loaded."""
    try:
        root, undo = apply(model, plan, keep_undo=True, structure_only=True)
    except (KeyError, NormswapError) as error:
        raise WeightsError(f"{path} does not fit {type(model).__name__}: {error}") from error
    load_state(root, tensors, str(path))
    return root, undo


def _undo_index(undo: Undo) -> dict[str, Any] | None:
    """What the undo tensors belong to; None when nothing was kept."""
    if not undo.complete:
        return None
    return {"norms": [list(n.paths) for n in undo.norms], "layers": [layer.path for layer in undo.layers]}


def _undo_tensors(undo: Undo) -> dict[str, Tensor]:
    if not undo.complete:
        return {}
    found: dict[str, Tensor] = {}
    for i, norm in enumerate(undo.norms):
        found |= {f"{_UNDO}norm.{i}.{name}": t for name, t in norm.tensors.items()}
        changed = {n: t for n, t in norm.given.items() if norm.tensors.get(n) is not t}
        found |= {f"{_UNDO}given.{i}.{name}": t for name, t in changed.items()}
    for i, layer in enumerate(undo.layers):
        parts = {n: getattr(layer, n) for n in ("scale", "shift", "bias", "correction", "weight")}
        found |= {f"{_UNDO}layer.{i}.{name}": t for name, t in parts.items() if t is not None}
    return {name: tensor.clone() if tensor.numel() else tensor for name, tensor in found.items()}


def _fill_undo(undo: Undo, tensors: Mapping[str, Tensor], index: Mapping[str, Any] | None) -> None:
    if index is None:
        undo.norms, undo.layers, undo.complete = [], [], False
        return
    for i, norm in enumerate(undo.norms):
        norm.tensors = _under(tensors, f"norm.{i}.")
        norm.given = {n: norm.tensors[n] for n in norm.given if n in norm.tensors} | _under(tensors, f"given.{i}.")
    undo.layers = [LayerUndo(path, **_layer_tensors(tensors, i)) for i, path in enumerate(index["layers"])]


def _layer_tensors(tensors: Mapping[str, Tensor], i: int) -> dict[str, Any]:
    return {"bias": None, **_under(tensors, f"layer.{i}.")}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(_UNDO + prefix) :]: v for k, v in tensors.items() if k.startswith(_UNDO + prefix)}


# --- writing ----------------------------------------------------------------------------------------------------


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with atomic(path) as temporary:
            save_file({k: t.detach().cpu() for k, t in tensors.items()}, temporary, metadata=metadata)
    except SafetensorError as error:
        raise OutputError(f"{path} cannot be written: {error}", hint="Is the disk full?") from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to a temporary name beside `path`; it takes the place of `path` only when all went well.

    Raises OutputError when the disk is full or the file cannot be written. Ctrl-C leaves nothing behind either.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        raise OutputError(
            f"{path} cannot be written: {'the disk is full' if full else error.strerror or error}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


