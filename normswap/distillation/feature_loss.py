"""What the norms inside the two networks give, as something more to learn from than the output alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.convert import back_in_order
from ..conversion.record import record_of
from ..modules.tree import module_at
from ..training.losses import distance


class Features:
    """Compares the output of each converted norm with the original's while the teacher runs, then the student.

    A converted network has the original's norms under the original's paths, so every layer has something to learn
    from, where the gradient of the output alone has to pass all that small groups have disturbed. Comparing half of
    the images holds memory for activations below 1.3 times what it is without. Source: Romero et al. 2015,
    "FitNets"; block-wise reconstruction as in Li et al. 2021, "BRECQ", here of all layers at once.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        record = record_of(student)
        steps = () if record is None else record.plan.steps
        modules = dict(teacher.named_modules(remove_duplicate=False))
        self._pairs = [(s.path, modules[s.path], module_at(student, s.path)) for s in steps if s.path in modules]
        self._teacher_order, self._student_order = back_in_order(teacher), back_in_order(student)
        self.paths = [path for path, _, _ in self._pairs]
        self._wanted: dict[str, list[Tensor]] = {}
        self._found: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect while the networks run, the teacher first."""
        self._wanted = {path: [] for path in self.paths}
        self._found = []
        with ExitStack() as stack:
            for path, teacher, student in self._pairs:
                for module, hook in ((teacher, self._keep(path)), (student, self._compare(path))):
                    stack.callback(module.register_forward_hook(hook).remove)
            yield

    def loss(self) -> Tensor | None:
        """The mean of `distance` over all calls of all norms; None where nothing could be compared."""
        found, self._found = self._found, []
        return torch.stack(found).mean() if found else None

    def _keep(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            self._wanted[path].append(
                self._teacher_order(path, _half(out)).clone()
            )  # what follows may change it in place

        return hook

    def _compare(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            given = self._student_order(path, _half(out))
            if self._wanted[path]:  # a norm with several calls has them in the same order in both networks
                wanted = self._wanted[path].pop(0)
                learns = given.requires_grad or not torch.is_grad_enabled()
                if wanted.shape == given.shape and learns and given.numel():
                    self._found.append(distance(wanted.to(given.device), given))

        return hook


def _half(out: Tensor) -> Tensor:
    return out[: -(-len(out) // 2)]
