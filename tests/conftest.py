"""Fixtures for every test."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

# The tests run in several processes at once; threads beside them would only wait for each other.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported until here stays: garbage collections need not go through all of it, and need not be so many."""
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_sessionfinish() -> None:
    """Libraries that count what is left of them at the end complain of what was never collected."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Initial weights and inputs are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def pictures() -> None:
    """For tests of what is drawn; the others run as on a machine without matplotlib."""


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing its curves takes a run longer than training networks as small as these."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
