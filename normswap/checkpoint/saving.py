"""Save a converted network in safetensors with a manifest, one file or shards, and load it back on any machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.apply import apply
from ..conversion.bound import bind, bound_after
from ..conversion.composite import combined_record
from ..conversion.history import Entry
from ..conversion.record import Check, Note, Record, attach, record_of
from ..conversion.stabilize import Sizes, at_own_size
from ..conversion.undo_record import Undo
from ..errors import CheckpointError, Fix, NetworkError, NormswapError, OptionError, PlanError, Text, WeightsError
from ..files.folders import reserved_folder
from ..files.sharding import parse_size, write_shards
from ..files.writing import reserved, write_safetensors
from ..heads.classifier import Head, resize_head
from ..modules.sharding import is_sharded
from ..modules.tree import module_at, replace_module
from ..modules.wrappers import check_module, unwrapped
from ..planning.plan import Plan
from ..sources.resolve import build_empty, build_full, parse
from ..sources.spec import Source
from ..sources.user_code import beside
from ..sources.weights import check_finite, has_empty_parameters, load_state
from .manifest import KEY, make_manifest, read_file
from .undo_tensors import PREFIX, check_undo, fill_undo, undo_tensors

_GATHER = (
    "Gather it, put that into a network that is converted in the same way, and save that one:\n"
    "full = torch.distributed.checkpoint.state_dict.StateDictOptions(full_state_dict=True)\n"
    "get_model_state_dict(model, options=full)"
)


def save(
    model: nn.Module, path: str | Path, *, overwrite: bool = False, max_shard_size: int | str | None = None
) -> Path:
    """Write a converted network, or one with converted parts, and its manifest to `path`, a safetensors file.

    The file knows how to build networks of the command line's sources, and of torchvision, timm and transformers; one
    that code of yours has built needs it again: `load(path, source="FILE.py:FACTORY")` or `load(path, model=...)`.

    max_shard_size: write a folder instead, in the layout of Hugging Face: files of at most so many bytes, or as much as
    "500MB", "2GB" or "2GiB" says, and the index `model.safetensors.index.json` with the manifest. A tensor that is
    larger gets a file of its own.

    Returns the path. The file, or folder, appears whole or not at all: it is written beside its place, synced, and
    renamed. Tied tensors are written once. overwrite: replace a file, or a folder of shards alone, that exists. Raises
    NormswapError for a model that normswap did not convert, OptionError for a size that is none, OutputError when
    `path` cannot be written, does not end in `.safetensors` (or does, for a folder), exists and overwrite is False, or
    is being written by somebody else.
    """
    check_module(model)
    model = unwrapped(model)
    record = combined_record(model)
    if record is None:
        raise NormswapError(
            "only a network from normswap.convert or normswap.load can be saved", hint="Convert it first."
        )
    path = Path(path)
    size = None if max_shard_size is None else parse_size(max_shard_size)
    with _place(path, overwrite, size), at_own_size(model):
        tensors, ties = _untied(model)
        channels_last = [name for name, tensor in model.state_dict().items() if _channels_last(tensor)]
        manifest = make_manifest(model, record, ties, channels_last)
        _write(path, tensors | undo_tensors(record.undo), {KEY: json.dumps(manifest)}, size)
    return path


def _place(path: Path, overwrite: bool, size: int | None) -> AbstractContextManager[None]:
    return (reserved if size is None else reserved_folder)(path, overwrite=overwrite)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], size: int | None) -> None:
    if size is None:
        write_safetensors(path, tensors, {"format": "pt", **metadata})
    else:
        write_shards(path, tensors, metadata, size)


def save_state(
    model: nn.Module, path: str | Path, *, overwrite: bool = False, max_shard_size: int | str | None = None
) -> Path:
    """Write any network's state dict to `path`, a plain safetensors file without a manifest. Returns the path.

    For what `revert` gives back: `load_state_dict(safetensors.torch.load_file(path))` and `--weights` read it. Tied
    tensors are written under each of their names. max_shard_size: a folder of shards instead, as `save` writes it.
    Whole or not at all, with the errors of `save`.
    """
    path = Path(path)
    size = None if max_shard_size is None else parse_size(max_shard_size)
    with _place(path, overwrite, size):
        tensors, ties = _untied(unwrapped(model))
        tensors |= {alias: tensors[name].clone() for alias, name in ties.items()}
        _write(path, tensors, {}, size)
    return path


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    source: str | Source | None = None,
    trust_code: bool = False,
    allow_nonfinite: bool = False,
) -> nn.Module:
    """Rebuild a network that `save` wrote: its architecture, the swap, and the weights. Returned in eval mode.

    path: a file, or the folder or index of shards.
    model: the original architecture, for one that only its caller can build; it is converted in place and returned. One
    that is converted in the same way already only gets the values. Of a network in DataParallel or torch.compile,
    what is within is returned.
    source: what builds the original architecture, in place of what the file says, such as `"nets.py:build"`; its code
    is run. A text takes the arguments that the file says.
    trust_code: run the factory that the manifest names, which is code of whoever wrote the file. A Python file is
    looked for in the current folder, then beside `path`.

    Raises OptionError for both a model and a source, CheckpointError for a file that is missing, damaged, not
    normswap's, of a newer version, or edited; SourceError or WeightsError when its architecture cannot be rebuilt or
    does not fit.
    """
    if model is not None and source is not None:
        raise OptionError("model and source exclude each other: one is built already, the other says how to")
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"the path of a file is needed, got {type(path).__name__}")
    manifest, tensors = read_file(Path(path))
    if source is not None:
        manifest["source"] = source_told(source, manifest).to_dict()
    plan = Plan.from_dict(manifest["plan"])
    stored = {k: tensors.pop(k) for k in list(tensors) if k.startswith(PREFIX)}
    with _intact(path):
        check_undo(stored, manifest["undo"])
        check = Check(**manifest["check"])
        tensors = _as_saved(tensors, manifest)
    if not allow_nonfinite:
        check_finite(tensors, path)
    if model is None:
        builder = _trusted_source(manifest, Path(path), trust_code or source is not None)
        root, undo = _swapped(_headed(build_empty(builder), manifest, path), plan, tensors, path)
        if has_empty_parameters(root):  # values that no state dict holds
            root, undo = _swapped(_headed(build_full(builder), manifest, path), plan, tensors, path)
    else:
        model = _headed(unwrapped(model), manifest, path)
        root, undo = _swapped(model, plan, tensors, path)
    _retie(root, manifest["ties"])
    fill_undo(undo, stored, manifest["undo"])
    for name, parameter in root.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(parameter.is_floating_point() and name not in manifest["no_grad"])
    attach(root, _record(manifest, plan, undo, check))
    root.eval()  # its own `train` need not return it
    return root


def _record(manifest: Mapping[str, Any], plan: Plan, undo: Undo, check: Check) -> Record:
    """What the network remembers of its conversion and of what was done since."""
    history = [Entry.from_dict(values) for values in manifest["history"]]
    notes: dict[type, Note] = {Head: Head(**manifest["head"])} if manifest.get("head") else {}
    record = Record(plan, undo, check, manifest["source"], history, notes=notes)
    record.inputs = dict(manifest.get("inputs") or {})
    return record


def _headed(model: nn.Module, manifest: Mapping[str, Any], path: str | Path) -> nn.Module:
    """The architecture with the last layer that fine-tuning has given it. Raises WeightsError where it has none."""
    if manifest.get("head"):
        head = Head(**manifest["head"])
        try:
            resize_head(model, head)
        except (KeyError, NetworkError) as error:
            what = f"{head.path}, which gives the scores in the file, is no linear layer or convolution of it"
            raise WeightsError(f"{path} does not fit {type(model).__name__}:\n  {what}") from error
    return model


def source_told(source: str | Source, manifest: Mapping[str, Any]) -> Source:
    """What the caller says builds the network; a factory in another place has the arguments of the one before."""
    if isinstance(source, Source):
        return source
    found, was = parse(source), manifest["source"]
    kept = was is not None and Source.from_dict(was).runs_code == found.runs_code
    return replace_fields(found, args=was["args"]) if kept else found


def _trusted_source(manifest: Mapping[str, Any], path: Path, trust_code: bool) -> Source:
    if manifest["source"] is None:
        raise CheckpointError(
            f"{path} does not know how to build its architecture",
            hint=Text(
                Fix("source", "FILE.py:FACTORY"),
                " says what makes the original network.\n"
                f'Or make that and pass it, in Python: normswap.load("{path}", model=my_model)',
            ),
        )
    source = Source.from_dict(manifest["source"])
    if source.runs_code and not trust_code:
        raise CheckpointError(
            f"{path} is built by {source}, and building it would run that code",
            hint=Text(
                "If you trust the file, pass ",
                Fix("trust_code", True),
                ".\nElse pass the network as ",
                Fix("model"),
                ".",
            ),
        )
    return beside(source, path)


@contextmanager
def _intact(path: str | Path) -> Iterator[None]:
    """Tell what only a file that others changed can cause."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: its tensors and its manifest do not belong together") from error


# --- tensors ----------------------------------------------------------------------------------------------------


def _untied(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each tensor once, and `alias -> name` for the others."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    by_view: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise NormswapError(f"{name} is a {type(tensor).__name__}, and safetensors holds tensors only")
        if is_sharded(tensor):
            raise NormswapError(f"{name} is shared out over processes, and this one holds a part of it", hint=_GATHER)
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


def _channels_last(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory as channels last, and in no other way."""
    return (
        not tensor.is_contiguous()
        and _format(tensor) is not None
        and tensor.is_contiguous(memory_format=_format(tensor))
    )


def _format(tensor: Tensor) -> Any:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())


def _as_saved(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """With the memory format that they had, and tied tensors under each of their names."""
    found = dict(tensors)
    for name in manifest["channels_last"]:
        if name in found:
            found[name] = found[name].contiguous(memory_format=_format(found[name]))
    return found | {alias: found[name] for alias, name in manifest["ties"].items()}


def _retie(root: nn.Module, ties: Mapping[str, str]) -> None:
    """Make names that held one tensor when saved hold one again."""
    for alias, name in ties.items():
        (owner, leaf), (source, source_leaf) = (_owner(root, n) for n in (alias, name))
        for table in ("_parameters", "_buffers"):
            if leaf in owner.__dict__[table] and source_leaf in source.__dict__[table]:
                owner.__dict__[table][leaf] = source.__dict__[table][source_leaf]


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module_at(root, path), leaf


def _swapped(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], path: str | Path) -> tuple[nn.Module, Undo]:
    """The original architecture with the swap done and the values loaded. On an error, the model is as it was."""
    record = record_of(model)
    if record is not None and record.note(Sizes) is None and _swaps(record.plan) == _swaps(plan):
        _add_affine(model, plan, tensors)
        load_state(model, tensors, str(path), cast=False)
        norms = [replace_fields(norm, tensors={}) for norm in record.undo.norms]
        return model, Undo(norms, complete=record.undo.complete)
    try:
        bound = bind(model, plan)
    except PlanError as error:
        raise WeightsError(
            f"{path} does not fit {type(model).__name__}:\n" + "\n".join(f"  {line}" for line in error.problems[:10]),
            hint=Text(Fix("model"), " takes the original network, as it was before the conversion."),
        ) from error
    model = _of_dtype(model, tensors)
    added = [layer for each in bound for layer in each.producers if layer._parameters["bias"] is None]
    root, undo = apply(model, bound, keep_undo=True, structure_only=True)
    _add_affine(root, plan, tensors)
    try:
        load_state(root, tensors, str(path), cast=False)
    except WeightsError:
        for norm in undo.norms:
            replace_module(root, norm.paths, norm.module)
        for layer in added:
            layer._parameters["bias"] = None
        raise
    return root, undo


def _swaps(plan: Plan) -> list[tuple[Any, ...]]:
    """What a conversion makes of the modules."""
    return [(s.path, s.aliases, s.source, s.target, s.options, s.transfer, s.producers) for s in plan.steps]


def _add_affine(root: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """A norm without gamma and beta has got them since, if the file holds them: from `calibrate`."""
    for each in bound_after(root, plan):
        norm = each.norm
        prefix = ".".join(part for part in (each.step.path, "" if norm is each.module else "norm") if part)
        for name in ("weight", "bias"):
            tensor = tensors.get(f"{prefix}.{name}" if prefix else name)
            if tensor is not None and name in norm._parameters and norm._parameters[name] is None:
                norm._parameters[name] = nn.Parameter(torch.empty_like(tensor), requires_grad=False)
                norm.affine = True


def _of_dtype(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Cast what the file does not hold, buffers that are in no state dict, along with what it does."""
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(dtypes) == 1 and any(t.dtype not in dtypes for t in model.buffers() if t.is_floating_point()):
        model.to(dtypes.pop())
    return model
