"""The demo's network: a residual network with batch norms, small enough to ship with its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("digits.safetensors")
"""What `recipes/train_digits.py` writes."""


class Block(nn.Module):
    """Two 3x3 convolutions with batch norms beside a shortcut (He et al. 2016): `(N, C, H, W)` to `(N, C', H', W')`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """`(N, 1, 8, 8)` images to `(N, 10)` logits; twelve batch norms of 16 or 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16), Block(16, 32, stride=2), Block(32, 32), Block(32, 32), Block(32, 32))
        self.classifier = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.bn(self.conv(x))))
        return self.classifier(x.mean((2, 3)))


def pretrained() -> DigitNet:
    """The network with the weights that come with the package, in eval mode."""
    from safetensors.torch import load_file

    network = DigitNet()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()
