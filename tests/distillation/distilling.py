"""What the tests of distillation share."""

from __future__ import annotations

from typing import Any

from helpers import Residual
from torch import Tensor, nn


class Classifier(nn.Module):
    """`(N, 3, H, W)` to `(N, 5)`, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = Residual(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.block(self.stem(x)).mean((2, 3))))


SHORT: dict[str, Any] = {"steps": 6, "batch_size": 8}
