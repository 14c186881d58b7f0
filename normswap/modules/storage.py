"""Where tensors lie: two tensors of one storage are two tensors, unless their bytes overlap."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Span = tuple[int, int, int]


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 where there is none."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if plain else 0


def span_of(tensor: Tensor) -> Span | None:
    """A tensor's storage, and its first byte in it and the one after its last; None where it has no memory."""
    storage = storage_of(tensor)
    if not storage or not tensor.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = int(tensor.storage_offset()), tensor.element_size()
    return storage, start * size, (start + int(last) + 1) * size


def overlap(a: Span | None, b: Span | None) -> bool:
    """Whether two spans have bytes in common."""
    return a is not None and b is not None and a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def sharers(tensors: Iterable[Tensor]) -> dict[int, int]:
    """By id, how many of the tensors are the same one, or lie in memory that overlaps with its own."""
    counts: dict[int, int] = defaultdict(int)
    spans: dict[int, Span | None] = {}
    by_storage: dict[int, list[int]] = defaultdict(list)
    for tensor in tensors:
        counts[id(tensor)] += 1
        if id(tensor) not in spans:
            span = spans[id(tensor)] = span_of(tensor)
            if span is not None:
                by_storage[span[0]].append(id(tensor))
    own = dict(counts)
    for ids in by_storage.values():
        for one in ids if len(ids) > 1 else ():
            counts[one] += sum(own[other] for other in ids if other != one and overlap(spans[one], spans[other]))
    return counts


class Origins:
    """Which step of a run made a tensor, told by the tensor itself, else by the memory that it lies in."""

    def __init__(self, model: nn.Module) -> None:
        # A run would take many times its memory if it kept its tensors, so ids and addresses are used again by others.
        # Each goes with a weak reference to what it stood for, and means nothing once that is gone.
        self._made_by: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._filled_by: dict[int, tuple[StorageWeakRef, int]] = {}  # for views no operation announces (`x.data`)
        self._computed: dict[int, tuple[StorageWeakRef, str]] = {}
        self._parameters: dict[int, list[tuple[Span, str]]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if (span := span_of(parameter)) is not None:
                self._parameters[span[0]].append((span, name))

    def note_parameter(self, name: str, tensor: Tensor) -> None:
        """Let what reads a tensor's memory read the parameter of that name."""
        if memory := storage_of(tensor):
            self._computed[memory] = StorageWeakRef(tensor.untyped_storage()), name

    def note(self, tensors: Iterable[Tensor], step: int, *, fills: bool = True) -> None:
        """fills: the memory of the tensors is the step's too."""
        for tensor in tensors:
            self._made_by[id(tensor)] = weakref.ref(tensor), step
            if fills and (memory := storage_of(tensor)):
                self._filled_by[memory] = StorageWeakRef(tensor.untyped_storage()), step

    def of(self, tensor: Tensor) -> int | None:
        made, step = self._made_by.get(id(tensor), (None, -1))
        return step if made is not None and made() is tensor else None

    def of_memory(self, tensor: Tensor) -> int | None:
        filled, step = self._filled_by.get(storage_of(tensor), (None, -1))
        return None if filled is None or filled.expired() else step

    def known(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those that a step made, or whose memory one filled."""
        return [t for t in tensors if self.of(t) is not None or self.of_memory(t) is not None]

    def parameters_in(self, tensor: Tensor) -> list[str]:
        """The names of the parameters that have bytes of the tensor's memory."""
        span = span_of(tensor)
        known = self._parameters.get(span[0], ()) if span is not None else ()
        memory, computed = self._computed.get(storage_of(tensor), (None, ""))
        held = [computed] if memory is not None and not memory.expired() else []
        return [*held, *(name for own, name in known if overlap(span, own))]
