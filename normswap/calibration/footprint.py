"""How much memory a run takes, from a run on one image, and what of the data fits in the memory that is free."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..comparison.layers import parts
from ..data.one_batch import images_in
from ..errors import NormswapError
from ..modules.tree import device_and_dtype
from .moments import Args


@dataclass(frozen=True)
class Footprint:
    """Bytes beside weights and inputs. peak: the most at any time; kept: the most while the run stands at a norm."""

    peak: float = 0.0
    kept: float = 0.0

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(self.peak + other.peak, self.kept + other.kept)

    def __mul__(self, factor: float) -> Footprint:
        return Footprint(self.peak * factor, self.kept * factor)


class _Living(TorchDispatchMode):
    """Watches every operation, and counts the bytes of what they have made and is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self._total = 0  # the dead included, since the last look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _plain((args, kwargs))}
        for tensor in _plain(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # a view, or changed in place
                self._sizes[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self._total += storage.nbytes()
        if self._total > self.peak:
            self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        """Bytes held now."""
        self._sizes = {key: (ref, size) for key, (ref, size) in self._sizes.items() if not ref.expired()}
        self._total = sum(size for _, size in self._sizes.values())
        return self._total


def _plain(tree: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(tree)
    return [t for t in leaves if type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided]


def footprint(model: nn.Module, args: Args, norms: Collection[nn.Module]) -> Footprint:
    """Of one forward pass on a batch, which is run (no gradients, hooks and modes are the caller's affair)."""
    from .matching import forward

    kept = 0

    def look(module: nn.Module, inputs: Any, out: Any) -> None:
        nonlocal kept
        kept = max(kept, living.now())

    with ExitStack() as stack:
        living = stack.enter_context(_Living())
        for norm in norms:
            stack.callback(norm.register_forward_hook(look).remove)
        forward(model, args)
    return Footprint(living.peak, kept)


def footprint_of_one(model: nn.Module, args: Args, norms: Collection[nn.Module]) -> Footprint:
    """Of one image of the batch; of its share in the whole batch where the network does not take a single one."""
    try:
        return footprint(model, next(parts(args, None, 1))[0], norms)
    except NormswapError:
        return footprint(model, args, norms) * (1 / images_in(args))


def fitting(
    batches: Sequence[Args],
    labels: Sequence[Tensor | None],
    one: Footprint,
    memory: float,
    limits: tuple[float, float] = (math.inf, math.inf),
) -> tuple[list[Args], list[Tensor | None], int]:
    """The batches, in smaller parts where one takes too much, and how many of them fit together.

    one: of the first image of the first batch; others take as much more as they are larger. While a part runs, what
    is kept of the other parts at the same norm is in memory too. At least one part is used, and a part has at least
    one image. limits: most images of a part, and of all that are used.
    """
    small = max(1, _size(batches[0]) / images_in(batches[0]))
    pairs: list[tuple[Args, Tensor | None]] = []
    for args, y in zip(batches, labels, strict=True):
        count = images_in(args)
        peak = one.peak * _size(args) / (small * count)
        pairs += parts(args, y, int(max(1, min(count, limits[0], memory / max(peak, 1)))))
    kept, used, images = 0.0, 0, 0
    running = max(_size(args) for args, _ in pairs) * (one.peak - one.kept) / small
    for args, _ in pairs:
        kept += _size(args) * one.kept / small
        images += images_in(args)
        if used and (kept + running > memory or images > limits[1]):
            break
        used += 1
    return [args for args, _ in pairs], [y for _, y in pairs], used


def _size(args: Args) -> int:
    return sum(t.numel() for t in pytree.tree_leaves(args) if isinstance(t, Tensor))


def free_memory(model: nn.Module) -> float:
    """Bytes that may still be taken on the model's device, infinity where the system does not say."""
    device = device_and_dtype(model)[0]
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + held)
    if device.type != "cpu":
        return float("inf")
    return min(_available(), _left_in_container())


def _available() -> float:
    """What Linux can give without swapping, its caches included; elsewhere, free pages."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return float("inf")


def _left_in_container() -> float:
    """Of the limit that a container sets (cgroup v2); file caches in it can be dropped."""
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (group / name for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return float(limit.read_text()) - float(used.read_text()) + float(stat.get("inactive_file", 0))
    except (OSError, ValueError):  # no limit reads "max"
        return float("inf")


def ran_out(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that memory did not suffice."""
    while error is not None:
        words = ("can't allocate memory", "not enough memory")
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error) for w in words):
            return True
        error = error.__cause__
    return False
