"""Read checkpoints that others wrote, and load them into a network.

safetensors, `.pth`, `.pt`, `.th`, shards with an index, folders of torch.distributed.checkpoint; wrapped (`state_dict`,
`model`, ...) and prefixed (`module.`, `_orig_mod.`) ones too. Files are memory-mapped, never unpickled beyond tensors
unless the caller trusts them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import Fix, Text, WeightsError
from ..files.spilling import mapped, spilled
from .distributed import is_distributed, read_distributed
from .shards import index_of, one_of_several, read_shards, whole_file
from .weight_files import read_file

State = dict[str, Tensor]
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights",
            "state_dict_ema", "model_ema", "ema")  # fmt: skip
_SHOWN = 10


def read_state(
    path: str | Path,
    *,
    trust_pickle: bool = False,
    allow_nonfinite: bool = False,
    when_several: Callable[[list[str]], None] | None = None,
) -> State:
    """The tensors of a checkpoint by name, on the CPU, memory-mapped where the format allows.

    path: a file; the index of shards (`*.index.json`) or its folder, as Hugging Face lays them out; or a folder of
    torch.distributed.checkpoint. trust_pickle runs code that a pickle may hold. allow_nonfinite accepts NaN and Inf.
    when_several: told the keys, where a file holds several networks' tensors (`model`, `model_ema`); the first is read.
    Raises WeightsError for a file that is missing, damaged, holds no tensors, pickled code, or NaN or Inf.
    """
    path = whole_file(Path(path))
    if is_distributed(path):
        state = _strip_prefixes(read_distributed(path, lambda names: _unwrap(names, path, when_several)))
    else:
        index = index_of(path)
        loaded = read_file(path, trust_pickle) if index is None else read_shards(index, trust_pickle)
        state = _strip_prefixes(_unwrap(loaded, path, when_several))
    mapped(state.values())
    if not allow_nonfinite:
        check_finite(state, path)
    return state


def in_parts(path: str | Path) -> bool:
    """Whether weights come in several files: shards, or a folder of torch.distributed.checkpoint."""
    return index_of(Path(path)) is not None or is_distributed(Path(path))


def load_state(model: nn.Module, state: Mapping[str, Tensor], origin: str, *, cast: bool = True) -> str | None:
    """Load `state` into `model`, replacing its tensors, each on the device that the model has there.

    cast: to the model's dtypes; else the dtypes of `state` are kept.
    A prefix all names share is dropped where that makes them fit. BN counters (`num_batches_tracked`) may be missing,
    and so may all names but one of a tied tensor; it stays tied.
    Returns what was cast, such as `float16 to float32`; None where nothing was.
    Raises WeightsError with at most ten missing, unexpected and mis-shaped names each, and the counts; the model is
    then as it was.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    ties = [[name for name in names if name in own] for names in _ties(model)]
    fitted = _fit_prefix(dict(state), own)
    for names in ties:
        present = [name for name in names if name in fitted]
        fitted |= {name: fitted[present[-1]] for name in names if present and name not in fitted}
    missing = [k for k in own if k not in fitted and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in fitted if k not in own and not k.endswith("num_batches_tracked")]
    misshaped = [
        f"{k}: {tuple(fitted[k].shape)} in the file, {tuple(own[k].shape)} in the model"
        for k in own
        if k in fitted and fitted[k].shape != own[k].shape and not _sizes_itself(model, k)
    ]
    if missing or unexpected or misshaped:
        parts = [_listing("missing", missing), _listing("unexpected", unexpected), _listing("mis-shaped", misshaped)]
        check = Text(
            "Check the source and the arguments of its builder, such as ", Fix("args", {"num_classes": 10}), "."
        )
        raise WeightsError(
            f"{origin} does not fit {type(model).__name__}:\n" + "\n".join(part for part in parts if part),
            hint=(one_of_several(Path(origin)) if missing else None) or check,
        )
    placed = {k: _like(v, own[k], cast) for k, v in fitted.items() if k in own}
    model.load_state_dict(placed, strict=False, assign=True)
    for names in ties:
        _tie(model, names)
    floats = [(fitted[name], becomes) for name, becomes in placed.items() if fitted[name].is_floating_point()]
    return ", ".join(sorted({_cast(was, becomes) for was, becomes in floats if was.dtype != becomes.dtype})) or None


def digest_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and values of a state dict: equal for networks with equal weights only."""
    total = hashlib.sha256()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.is_meta:  # without values
            total.update(f"{name}\n".encode())
        else:
            total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().view(-1)
            total.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return total.hexdigest()


def _like(tensor: Tensor, own: Tensor, cast: bool) -> Tensor:
    dtype = own.dtype if cast and not tensor.is_complex() else tensor.dtype
    placed = tensor.to(device=None if own.is_meta else own.device, dtype=dtype)
    return placed if placed is tensor else spilled(placed)


def _cast(was: Tensor, becomes: Tensor) -> str:
    return " to ".join(str(tensor.dtype).removeprefix("torch.") for tensor in (was, becomes))


def _sizes_itself(model: nn.Module, name: str) -> bool:
    """Whether a tensor is that of an observer of values, which is empty before it has seen any, and loads any shape."""
    owner = type(model.get_submodule(name.rpartition(".")[0])).__module__
    return owner.startswith(("torch.ao.quantization.", "torchao.quantization."))


def _ties(model: nn.Module) -> list[list[str]]:
    """Names of each parameter or buffer that several modules hold under several names."""
    names: dict[Tensor, list[str]] = {}
    for module_path, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    names.setdefault(tensor, []).append(f"{module_path}.{name}" if module_path else name)
    return [group for group in names.values() if len(group) > 1]


def _tie(model: nn.Module, names: list[str]) -> None:
    """One tensor under all these names again: the last one's, as loading them in turn would leave it."""
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    for table in ("_parameters", "_buffers"):
        holders = [(module.__dict__[table], leaf) for module, leaf in places if leaf in module.__dict__[table]]
        for holder, leaf in holders:
            holder[leaf] = holders[-1][0][holders[-1][1]]


def _listing(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f"\n    ... and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"  {len(names)} {title}:\n    " + "\n    ".join(names[:_SHOWN]) + more


def _fit_prefix(state: State, own: Mapping[str, Tensor]) -> State:
    if own.keys() & state.keys() or not state:
        return state
    first = next(iter(state)).split(".")
    for depth in range(1, min(4, len(first))):
        prefix = ".".join(first[:depth]) + "."
        if all(k.startswith(prefix) for k in state) and any(k[len(prefix) :] in own for k in state):
            return {k[len(prefix) :]: v for k, v in state.items()}
    return state


def check_finite(state: Mapping[str, Tensor], origin: object) -> None:
    """Raise WeightsError naming the tensors that hold NaN or Inf."""
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not _finite(tensor)]
    if bad:
        raise WeightsError(
            f"{origin} holds NaN or Inf:\n" + _listing("not finite", bad),
            hint=Text("Pass ", Fix("allow_nonfinite", True), " to use it all the same."),
        )


def _finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    if tensor.element_size() == 1:  # eight-bit floats have no aminmax
        tensor = tensor.to(torch.float32)
    low, high = torch.aminmax(tensor)  # NaN propagates, and nothing of the tensor's size is allocated
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _unwrap(loaded: Any, path: Path, when_several: Callable[[list[str]], None] | None = None) -> State:
    """The mapping of tensors inside whatever a training script saved around it."""
    if isinstance(loaded, nn.Module):
        return dict(loaded.state_dict())
    if isinstance(loaded, Mapping):
        tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)}
        inner = [k for k in WRAPPERS if isinstance(loaded.get(k), (Mapping, nn.Module))]
        if inner and len(tensors) < len(loaded):
            full = [key for key in inner if _holds_tensors(loaded[key])]
            if when_several is not None and len(full) > 1 and full[0] == inner[0]:
                when_several(full)
            return _unwrap(loaded[inner[0]], path, when_several)
        if tensors:
            return {str(k): v for k, v in tensors.items()}
    raise WeightsError(
        f"{path} holds no tensors by name",
        hint=f"Expected a state dict, or one under a key such as {', '.join(WRAPPERS[:3])}.",
    )


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, nn.Module) or any(isinstance(each, Tensor) for each in value.values())


def _strip_prefixes(state: State) -> State:
    """Drop what DataParallel and torch.compile put before names; `model.` and the like only if all have it."""
    state = {k.replace("_orig_mod.", ""): v for k, v in state.items()}
    for prefix in ("module.", "_forward_module."):
        while state and all(k.startswith(prefix) for k in state):
            state = {k[len(prefix) :]: v for k, v in state.items()}
    return state


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Within it, newly built modules have parameters on the meta device: no memory, no time for initialisation.

    Buffers stay real, because some are never in a state dict and hold computed values.
    """
    emptied = WeakIdKeyDictionary()  # a parameter registered twice is one parameter, and not kept alive for that

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            if param not in emptied:
                emptied[param] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            param = emptied[param]
        _REGISTER(self, name, param)

    with _registering(register), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Draws no normal values for a tensor without values, for which PyTorch's Python takes half a millisecond each."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def filled_parameters() -> AbstractContextManager[None]:
    """Within it, `empty_parameters` is suspended: what is registered now, such as loaded values, stays as it is."""
    return _registering(_REGISTER)


_REGISTER = nn.Module.register_parameter


@contextmanager
def _registering(register: Callable[[nn.Module, str, nn.Parameter | None], None]) -> Iterator[None]:
    module: Any = nn.Module
    before = module.register_parameter
    module.register_parameter = register
    try:
        yield
    finally:
        module.register_parameter = before


def has_empty_parameters(model: nn.Module) -> bool:
    """Whether some parameter, buffer or plain tensor attribute still has no values."""
    attributes = (value for module in nn.Module.modules(model) for value in module.__dict__.values())
    tensors = (value for value in attributes if isinstance(value, Tensor))
    return any(t.is_meta for t in (*model.parameters(), *model.buffers(), *tensors))
