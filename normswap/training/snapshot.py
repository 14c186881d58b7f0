"""A copy in memory of what trains, to which a run can go back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Snapshot:
    """Tensors as they were at a step, kept beside those that change.

    tensors: gives the ones that change, by name. device: where the copy is, None for theirs. step: when it was taken.
    """

    def __init__(self, tensors: Callable[[], Mapping[str, Tensor]], device: str | None = None) -> None:
        self._tensors, self._device = tensors, device
        self.kept: dict[str, Tensor] = {}
        self.step = 0

    def take(self, step: int) -> None:
        """Copy the tensors as they are now; an interrupt leaves the copy of before."""
        now = self._tensors().items()
        self.kept, self.step = {n: t.detach().to(self._device or t.device, copy=True) for n, t in now}, step

    @torch.no_grad()
    def put_back(self) -> int:
        """Give the tensors the values that were kept. Returns the step."""
        for name, now in self._tensors().items():
            now.copy_(self.kept[name])
        return self.step
