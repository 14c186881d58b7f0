"""What the training loop asks of a task: how to batch samples, a loss to lower, figures to report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

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
        """The figures over all processes."""


class Task(Protocol):
    """A kind of training: classification, detection, ..."""

    name: ClassVar[str]
    """As --task has it."""
    best: ClassVar[str]
    """The validation figure by which the best network is chosen; the larger the better."""
    shares: ClassVar[Mapping[str, str]]
    """For each of the sums, the figure it makes when divided by the number of samples."""

    def collate(self, items: Sequence[Any]) -> Any:
        """Samples -> the content of a batch."""

    def outcome(self, forward: Callable[..., Any], content: Any) -> Outcome:
        """The loss on a batch, on the network's device."""

    def meter(self) -> Meter:
        """For one pass over the validation set."""


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
