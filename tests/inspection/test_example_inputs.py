"""Inputs guessed for a network nobody gave any for."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import Net, conv_bn, fingerprint
from torch import Tensor, nn

from normswap.inspection.example_inputs import guess_inputs, random_tensor, runs


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
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 160 * 64, 2)), (1, 3, 160, 64)),
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


class Configured(Net):
    """Takes one size, which its configuration names."""

    def __init__(self, size: tuple[int, int], **config: object) -> None:
        super().__init__()
        self.size = size
        self.__dict__.update(config)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(tuple(x.shape[2:]) == self.size, "size")
        return super().forward(x)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(7, 5), nn.Conv1d(5, 4, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.conv(self.embed(words).transpose(1, 2))


class Waves(nn.Module):
    """Makes its map of a sound by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unfold(1, 400, 200)[:, None])


class Signal(nn.Module):
    """Takes a map of one channel without that dimension; its classifier says of which size."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Linear(math.prod(size), 2)

    def forward(self, x: Tensor) -> Tensor:
        n, _, _ = x.shape
        return self.fc(self.norm(self.conv(x.reshape(n, 1, *x.shape[1:]))).mean(1).flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0][:, -1])


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.attention = nn.Linear(6, 4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        y = self.fc(x)
        return self.attention(y, y, y)[0].reshape(n, length, 4)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (Configured((40, 48), pretrained_cfg={"input_size": (3, 40, 48)}), (1, 3, 40, 48)),
        (Configured((40, 48), default_cfg=SimpleNamespace(input_size=(3, 40, 48))), (1, 3, 40, 48)),
        (Configured((72, 72), config=SimpleNamespace(image_size=72, num_channels=3)), (1, 3, 72, 72)),
        (Configured((40, 48), config=SimpleNamespace(image_size=[40, 48])), (1, 3, 40, 48)),
        (Words(), (2, 16)),
        (Waves(), (1, 16000)),
        (Signal(1, 3000), (1, 1, 3000)),
        (Signal(64, 80), (1, 64, 80)),
        (Recurrent(), (2, 16, 6)),
        (Tokens(), (2, 16, 6)),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.Unflatten(1, (4,))), (2, 784)),
        (nn.Sequential(nn.MaxPool2d(1), nn.Flatten(), nn.Linear(3 * 81, 4)), (2, 3, 9, 9)),
        (nn.Sequential(nn.Conv3d(1, 2, 1), nn.Flatten(), nn.Linear(2 * 32**3, 2)), (1, 1, 32, 32, 32)),
    ],
)
def test_configurations_and_other_first_layers_say_it_too(net: nn.Module, shape: tuple[int, ...]) -> None:
    (x,) = guess_inputs(net)
    assert tuple(x.shape) == shape
