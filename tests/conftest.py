"""Fixtures for every test."""

from __future__ import annotations

import pytest
import torch

# The tests run in several processes at once; threads beside them would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Initial weights and inputs are the same in every run."""
    torch.manual_seed(0)
