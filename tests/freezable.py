"""A network to freeze, and what training does to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import contents, randomized

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Detector(nn.Module):
    """Norms at several depths: a backbone with two of them, a head with one."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.backbone = nn.ModuleDict({"stem": stem, "layer1": nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)))})
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(144, 6), nn.BatchNorm1d(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone["stem"](x)
        return self.head(self.backbone["layer1"](x))


NORMS = ("backbone.stem.1", "backbone.layer1.0.0", "head.2")


def detector() -> Any:
    return randomized(Detector()).train()


def train(model: nn.Module, steps: int = 3, **options: Any) -> None:
    """Steps of AdamW with weight decay, in train mode."""
    optimizer = torch.optim.AdamW((p for p in model.parameters()), lr=0.1, weight_decay=0.1)
    model.train()
    for step in range(steps):
        optimizer.zero_grad(**options)
        (model(X + step) ** 2).mean().backward()
        optimizer.step()


def norms_of(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    """Everything that the norms hold, bit for bit, under the names of the bare model."""
    names = ((n.removeprefix("module.").removeprefix("_orig_mod."), v) for n, v in contents(model).items())
    return {name: value for name, value in names if name.startswith(NORMS)}
