"""Inputs guessed for a network nobody gave any for."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, conv_bn, fingerprint
from torch import Tensor, nn

from normswap.example import guess_inputs, random_tensor, runs


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (conv_bn(4), (1, 3, 64, 64)),
        (conv_bn(4, dims=1), (1, 3, 256)),
        (conv_bn(4, dims=3), (1, 3, 16, 64, 64)),
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), (2, 5)),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6)), (2, 6, 8, 8)),
        (nn.BatchNorm1d(6), (2, 6, 8)),
        (nn.BatchNorm3d(6), (2, 6, 4, 8, 8)),
        (nn.GroupNorm(2, 6), (2, 6, 8, 8)),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(100)), (1, 3, 224, 224)),
        (nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(4 * 64 * 64, 2)), (1, 1, 64, 64)),
        (nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(4 * 32 * 32, 2)), (1, 1, 32, 32)),
    ],
)
def test_the_first_layers_say_what_a_network_takes(net: nn.Module, shape: tuple[int, ...]) -> None:
    (x,) = guess_inputs(net)
    assert tuple(x.shape) == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_input_has_the_networks_dtype(dtype: torch.dtype) -> None:
    (x,) = guess_inputs(conv_bn(4).to(dtype))
    assert x.dtype is dtype


def test_the_input_is_the_same_each_time_and_standard_normal() -> None:
    net = conv_bn(4)
    (x,), (y,) = guess_inputs(net), guess_inputs(net)
    assert torch.equal(x, y)
    assert abs(float(x.mean())) < 0.05
    assert abs(float(x.std()) - 1) < 0.05
    assert torch.equal(random_tensor((3, 2), net), random_tensor((3, 2), net))


def test_a_detector_gets_a_list_of_images() -> None:
    transform = pytest.importorskip("torchvision.models.detection.transform")

    class Detector(Net):
        def __init__(self) -> None:
            super().__init__()
            self.transform = transform.GeneralizedRCNNTransform(32, 64, [0.0] * 3, [1.0] * 3)

        def forward(self, images: list[Tensor]) -> Tensor:
            return super().forward(self.transform(images)[0].tensors)

    (images,) = guess_inputs(Detector())
    assert [tuple(image.shape) for image in images] == [(3, 128, 160)]
    assert float(images[0].min()) >= 0
    assert float(images[0].max()) <= 1


def test_where_no_guess_runs_there_is_none() -> None:
    class Picky(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("never")

    assert guess_inputs(Picky()) is None
    assert guess_inputs(nn.ReLU()) is None


@pytest.mark.parametrize("works", [True, False])
def test_trying_leaves_the_network_and_the_random_state_as_they_were(works: bool) -> None:
    class Counting(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            torch.rand(1)
            assert not self.training
            return super().forward(x if works else x[0, 0])

    net = Counting().train()
    before, state = fingerprint(net), torch.get_rng_state()
    assert runs(net, (torch.randn(1, 3, 8, 8, generator=torch.Generator()),)) is works
    assert fingerprint(net) == before
    assert torch.equal(torch.get_rng_state(), state)
