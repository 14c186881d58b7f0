"""What the tests of files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import randomized
from torch import nn

import normswap
from normswap.checkpoint.saving import save


class Small(nn.Sequential):
    """Two convolutions, each with its BN, of several eps and momenta; `(N, 3, H, W)`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width, eps=1e-3, momentum=0.01),
            nn.ReLU(),
            nn.Conv2d(width, width, 3),
            nn.BatchNorm2d(width, momentum=None),
        )


def small(**kwargs: Any) -> nn.Module:
    return randomized(Small(**kwargs))


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}


def written(folder: Path, to: str = "gn", model: nn.Module | None = None, **kwargs: Any) -> Path:
    return save(normswap.convert(model or small(), to, **kwargs), folder / "a.safetensors", overwrite=True)
