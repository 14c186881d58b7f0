"""Two views of one storage are two tensors, unless they have bytes in common."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MODES, X, bits, edges, randomized
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.memory import overlap, sharers, span_of


class Pairs(nn.Module):
    """Two convolutions whose weights are parts of one storage, from `starts` on."""

    def __init__(self, starts: tuple[int, int] = (0, 36)) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        flat = torch.randn(400)
        for layer, start in zip((self.conv1, self.conv2), starts, strict=True):
            layer.weight = nn.Parameter(flat[start : start + layer.weight.numel()].view_as(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(y)) + y


class UsedTwice(Pairs):
    """The same, with both weights used once more."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(y)) + F.conv2d(y, self.conv2.weight, padding=1) + F.conv2d(x, self.conv1.weight)


def test_spans_overlap_where_numpy_finds_shared_memory() -> None:
    base = torch.arange(60.0)
    views = [base, base[:20], base[20:40], base[19:21], base[40:].view(4, 5), base[40:].view(4, 5)[2:], base.clone()]
    for a, b in combinations(views, 2):
        assert overlap(span_of(a), span_of(b)) == np.shares_memory(a.numpy(), b.numpy())


def test_what_has_no_memory_overlaps_with_nothing() -> None:
    empty, meta = torch.empty(0), torch.empty(3, device="meta")
    assert span_of(empty) is None
    assert span_of(meta) is None
    assert set(sharers([empty, meta, torch.empty(0), torch.empty(3, device="meta")]).values()) == {1}


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_lie_in_one_storage_side_by_side_are_folded(mode: str) -> None:
    assert edges(Pairs((0, 36)), mode) == {"bn1": ("conv1",), "bn2": ("conv2",)}


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_share_some_of_their_memory_are_not_folded(mode: str) -> None:
    assert edges(Pairs((0, 8)), mode) == {}


@pytest.mark.parametrize("mode", MODES)
def test_each_weight_of_one_storage_that_is_used_elsewhere_is_known(mode: str) -> None:
    assert edges(UsedTwice(), mode) == {}


@pytest.mark.parametrize("starts", [(0, 12), (144, 0), (0, 100)])
def test_views_of_one_storage_are_saved_and_loaded_as_the_tensors_they_are(
    starts: tuple[int, int], tmp_path: Path
) -> None:
    converted = normswap.convert(randomized(Pairs(starts)), "gn", groups=2, example_inputs=X)
    file = normswap.save(converted, tmp_path / "a.safetensors")
    assert {"conv1.weight", "conv2.weight"} <= load_file(file).keys()
    loaded = normswap.load(file, model=Pairs())
    for name, tensor in converted.state_dict().items():
        assert bits(tensor) == bits(loaded.state_dict()[name])


def test_views_of_one_shape_at_other_offsets_are_no_ties(tmp_path: Path) -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            flat = torch.randn(2, 4)
            self.register_buffer("first", flat[0])
            self.register_buffer("second", flat[1])

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + (self.first * self.second)[:, None, None]

    converted = normswap.convert(randomized(Stacked()), "ln")
    loaded = normswap.load(normswap.save(converted, tmp_path / "a.safetensors"), model=Stacked())
    assert torch.equal(loaded.first, converted.first)
    assert torch.equal(loaded.second, converted.second)
    assert not torch.equal(loaded.first, loaded.second)
