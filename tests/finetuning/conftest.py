"""Digits and a converted network to fine-tune."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import normswap
from normswap.demo.digits import split
from normswap.demo.network import pretrained


@pytest.fixture(scope="module")
def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """40 training and 50 validation digits."""
    train, test = split()
    return (train.images[:40], train.labels[:40]), (test.images[:50], test.labels[:50])


@pytest.fixture
def gn() -> nn.Module:
    return normswap.convert(pretrained(), "gn", groups=4)


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let progress be told of every step, however fast they are."""
    monkeypatch.setattr("normswap.finetuning.engine.reporter.BETWEEN", -1.0)
