"""A network, its conversion and images to distil on."""

from __future__ import annotations

import pytest
import torch
from distilling import Classifier
from helpers import randomized
from torch import Tensor, nn

import normswap


@pytest.fixture
def images() -> Tensor:
    return torch.randn(40, 3, 8, 8)


@pytest.fixture
def original() -> nn.Module:
    return randomized(Classifier())


@pytest.fixture
def model(original: nn.Module) -> nn.Module:
    return normswap.convert(original, "gn", groups=2)
