"""What the training loop asks of a task: data, a head, how to batch samples, a loss to lower, figures to report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ...heads.classifier import Head
from ...inspection.roles import roles_of
from ..datasets.splits import Sets
from ..output.by_class import ByClass
from ..output.panel import Panel

Reduce = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes."""


@dataclass(frozen=True)
class Outcome:
    """One forward pass in training.

    loss: scalar with a gradient, the mean over the samples. sums: figures summed over the samples, no gradient.
    """

    loss: Tensor
    sums: Mapping[str, Tensor] = field(default_factory=dict)


class Meter(Protocol):
    """Figures of a validation set, gathered batch by batch."""

    def add(self, model: nn.Module, content: Any) -> None:
        """Run the network, in eval mode, on one batch."""

    def result(self, total: Reduce) -> dict[str, float]:
        """The figures over all processes; each of them calls this."""

    def by_class(self, names: Sequence[str]) -> ByClass:
        """Of each class, after `result`; each process calls this. names: of the data's classes, as far as known."""


class Task(Protocol):
    """A kind of training: classification, detection, segmentation."""

    name: ClassVar[str]
    """As --task has it."""
    best: ClassVar[str]
    """The validation figure by which the best network is chosen; the larger the better."""
    panels: ClassVar[tuple[Panel, ...]]
    """What curves.png shows, row by row."""
    at_once: ClassVar[int]
    """Samples of a validation batch, if training batches are smaller."""
    compiled_part: ClassVar[str | None]
    """What --compile compiles, where the rest is Python over lists; None for the whole network."""

    def open(self, model: nn.Module, data: Any, eval_data: Any, *, seed: int) -> Sets:
        """What the caller gave as data -> a training and a validation set."""

    def open_one(self, model: nn.Module, data: Any) -> Sets:
        """What the caller gave as data -> one set to measure on, as both parts."""

    def prepared(self, sets: Sets, preprocess: Callable[[Any], Tensor] | None, augment: str) -> Sets:
        """The sets as the network is to see them; random changes are for those that normswap reads itself."""

    def inputs(self, sets: Sets, preprocess: Callable[[Any], Tensor] | None, count: int) -> Iterator[Any]:
        """Batches of up to `count` training inputs to calibrate on, without random changes."""

    def fit(self, model: nn.Module, sets: Sets, num_classes: int | None, seed: int) -> Head | None:
        """Find what gives the scores; give it another number of classes if that is asked for, or the data needs it."""

    def head_parameters(self, model: nn.Module, head: Head | None) -> Collection[str] | None:
        """The names of the parameters that --train head trains; None where they are not known."""

    def collate(self, items: Sequence[Any]) -> Any:
        """Samples -> the content of a batch."""

    def outcome(self, forward: Callable[..., Any], content: Any) -> Outcome:
        """The loss on a batch, on the network's device."""

    def meter(self) -> Meter:
        """For one pass over the validation set."""

    def draw(self, network: nn.Module, content: Any, path: Path) -> bool:
        """Write a page of the pictures of a batch and what the network makes of them; False where there is none."""


def parameters_of_head(model: nn.Module) -> set[str] | None:
    """The parameters that are in the head by their role (see `roles`); None where nothing is."""
    roles = roles_of([name for name, _ in model.named_modules()])
    found = {name for name, _ in model.named_parameters() if roles[name.rpartition(".")[0]] == "head"}
    return found or None


def on_device(content: Any, device: torch.device, *, channels_last: bool = False) -> Any:
    """The batch on a device; images `(N, C, H, W)` in channels last, if asked for."""
    if isinstance(content, Tensor):
        form = torch.channels_last if channels_last and content.dim() == 4 else torch.preserve_format
        return content.to(device, non_blocking=True, memory_format=form)
    if isinstance(content, Mapping):
        return {k: on_device(v, device, channels_last=channels_last) for k, v in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(on_device(v, device, channels_last=channels_last) for v in content)
    return content
