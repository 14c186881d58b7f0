"""CUDA devices where there are none: tensors that claim `cuda:N`, hold values on the CPU, and refuse to meet others.

torch's FakeTensorMode claims devices too, but has no values, and normswap reads values (a norm, a loss) on its way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
_MOVES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default, aten.set_.source_Tensor}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # CUDA takes indices of the CPU


class OnCuda(Tensor):
    """A tensor of a CUDA device; its values are in `held`. One of the CPU takes values of CUDA, by `data`.

    To torch's own code it is on the meta device, which needs no driver and no kernels of its own; Python sees CUDA.
    """

    held: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device) -> OnCuda:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device="meta", requires_grad=False,
        )  # fmt: skip
        made.held, made.place = held, place
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self.place)
    is_cuda = property(lambda self: self.place.type == "cuda")
    is_cpu = property(lambda self: self.place.type == "cpu")
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.held, self.place = value.held if isinstance(value, OnCuda) else value, value.device

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__(_indices(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_indices(key), value)

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.device}: {self.held!r}"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:  # lets Module.to swap tensors, so that they stay the same
        return ["held"], self.device

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], device: torch.device, size: Any, stride: Any) -> OnCuda:
        return OnCuda(inner["held"], device)


class _Factories(TorchDispatchMode):
    """Makes tensors that are asked for on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _indices(key: Any) -> Any:
    """Lists as tensors of the CPU: torch's own code would make them on the meta device, without values."""
    if isinstance(key, tuple):
        return tuple(map(_indices, key))
    return torch.tensor(key) if isinstance(key, list) else key


def _place_of(asked: Any, tensors: list[Tensor]) -> torch.device:
    """Where the result is: as asked, else with the tensors on CUDA. What torch's own code asks for as meta is CUDA."""
    on_cuda = [value for value in tensors if isinstance(value, OnCuda)]
    told = torch.device(asked) if asked is not None else None
    if told is not None and told.type == "meta":
        return on_cuda[0].place if on_cuda else torch.device("cuda", torch.cuda.current_device())
    if told is not None:
        return torch.device("cuda", told.index or 0) if told.type == "cuda" else told
    return max(on_cuda, key=lambda value: value.dim()).place if on_cuda else torch.device("cpu")


def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """What CUDA refuses: tensors of two devices, other than numbers, copies and indices."""
    meeting = args[:1] if func in _INDEXED else tensors
    places = {str(value.device) for value in meeting if value.dim()}
    if func not in _MOVES and len(places) > 1:
        found = " and ".join(sorted(places))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} ({func})")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = tree_flatten((args, kwargs))[0]
    tensors = [value for value in flat if isinstance(value, Tensor)]
    _check(func, args, tensors)
    place = _place_of(kwargs.get("device"), tensors)
    if place.type == "cuda" and any(isinstance(value, torch.Generator) for value in flat):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    given = {id(value.held): value for value in tensors if isinstance(value, OnCuda)}
    inner = tree_map(lambda v: v.held if isinstance(v, OnCuda) else v, (args, kwargs))
    found = func(*inner[0], **inner[1])
    if func is aten.detach.default and isinstance(args[0], OnCuda):
        return OnCuda(found, args[0].place)

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in given:  # in place: the very tensor that was given
            return given[id(value)]
        return OnCuda(value, place) if place.type == "cuda" and not isinstance(value, OnCuda) else value

    return tree_map(outer, found)


_plain_to = torch.Tensor.to


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`cuda` is the current device, which the driver would have to tell."""
    if args and isinstance(args[0], OnCuda):
        args = (args[0].place, args[0].dtype, *args[1:])
    args = tuple(_with_index(value) for value in args)
    kwargs = {name: _with_index(value) for name, value in kwargs.items()}
    return _plain_to(tensor, *args, **kwargs)


def _stream(*_: Any) -> Any:
    return SimpleNamespace(is_capturing=lambda: False)


_plain_run = threading.Thread.run


def _thread_run(thread: threading.Thread) -> None:
    """A mode belongs to one thread; a driver does not."""
    with _Factories():
        _plain_run(thread)


def _with_index(value: Any) -> Any:
    named = value == "cuda" or (isinstance(value, torch.device) and value == torch.device("cuda"))
    return torch.device("cuda", torch.cuda.current_device()) if named else value


@contextmanager
def pretended_cuda(devices: int = 1) -> Iterator[None]:
    """Within it, torch has CUDA devices. What is left out of the pretence raises an error."""
    generators = tuple(torch.Generator() for _ in range(devices))
    now = [0]

    def exchanged(index: int) -> int:
        before, now[0] = now[0], index if index >= 0 else now[0]
        return before

    stand_ins: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: devices,
        "current_device": lambda: now[0],
        "set_device": lambda device: exchanged(-1 if (index := torch.device(device).index) is None else index),
        "_exchange_device": exchanged,
        "_maybe_exchange_device": exchanged,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "get_rng_state": lambda device="cuda": generators[0].get_state(),
        "set_rng_state": lambda state, device="cuda": generators[0].set_state(state),
        "manual_seed_all": lambda seed: [g.manual_seed(seed) for g in generators],
        "mem_get_info": lambda device=None: (1 << 30, 1 << 31),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "is_bf16_supported": lambda including_emulation=True: True,
    }  # fmt: skip
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes it on the CPU, and moves it then
    try:
        with (
            mock.patch.multiple(torch.cuda, default_generators=generators, **stand_ins),
            mock.patch.multiple(torch.accelerator, current_device_index=lambda: now[0], current_stream=_stream),
            mock.patch.multiple(torch.Tensor, to=_to, pin_memory=lambda self, *_: self),
            mock.patch.object(threading.Thread, "run", _thread_run),
            _Factories(),
        ):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
