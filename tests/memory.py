"""How many bytes of tensors a run holds at once, counted, not read from the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Held(TorchDispatchMode):
    """Watches every operation in its thread. `peak`: the most bytes that what they have made held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in given and self.counts(tensor):
                storage = tensor.untyped_storage()
                self._storages[_key(tensor)] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: (ref, size) for key, (ref, size) in self._storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return out

    def counts(self, tensor: Tensor) -> bool:
        """Whether what an operation has made is to be counted."""
        return True


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak(run: Callable[[], object]) -> int:
    """The most bytes that `run` holds at a time, beside what lived before."""
    with Held() as held:
        run()
    return held.peak


class Wasteful(nn.Module):
    """Thirty temporaries of one size behind each convolution, none of which outlives the next."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv, self.norm), (self.conv2, self.norm2)):
            x = norm(conv(x))
            for i in range(30):
                x = torch.sigmoid(x * (1 + i / 30))
        return self.head(x.mean((2, 3)))
