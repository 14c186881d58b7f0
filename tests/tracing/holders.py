"""Networks that hold a layer outside of the module tree too."""

from __future__ import annotations

from helpers import Net
from torch import Tensor


class Stored(Net):
    """Keeps the convolution's output for others."""

    raw: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.raw = self.conv(x)
        return self.bn(self.raw)


class StoredInList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features.append(self.conv(x))
        return self.bn(self.features[-1])


class StoredInDict(Net):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, dict[str, Tensor]] = {"a": {}}

    def forward(self, x: Tensor) -> Tensor:
        self.cache["a"]["b"] = y = self.conv(x)
        return self.bn(y)
