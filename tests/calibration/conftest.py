"""What the tests of calibration start from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from calibrated import Net, images, trained
from helpers import randomized
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small only wait for their threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def net() -> nn.Module:
    """A network whose statistics are those of `images()`, as after training."""
    return trained(randomized(Net()), images(40, seed=7))
