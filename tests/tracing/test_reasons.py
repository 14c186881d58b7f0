"""Why a norm cannot be folded: the reason names the layer, and is true of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import MODES, Net, look
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Own(nn.Module):
    """A layer with a weight that is no torch layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Parameter(torch.zeros(4))


class EqualizedRate(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 0.5, self.bias)


class Einsum(Own):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,oc->nohw", x, self.weight[:, :, 0, 0]) + self.bias[:, None, None]


class Functional(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def own(name: str) -> str:
    return f"conv is of a class of its own, {name}, whose output is not known to scale with its weight"


CLASSES = {
    "weight-standardised": (
        lambda: Standardized(3, 4, 1), "the weight of conv is computed by its class, Standardized, not a parameter",
    ),
    "equalised rate": (EqualizedRate, "the weight of conv is computed by its class, EqualizedRate, not a parameter"),
    "other operations": (Einsum, own("Einsum")),
    "no torch layer": (Functional, own("Functional")),
    "more after it": (lambda: Doubled(3, 4, 1), own("Doubled")),
    "spectral norm on its own class": (
        lambda: parametrizations.spectral_norm(Doubled(3, 4, 1)), "the weight of conv is computed, not a parameter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CLASSES)
def test_a_layer_of_another_class_is_named_with_what_its_class_does(case: str, mode: str) -> None:
    net: Any = Net()
    make, reason = CLASSES[case]
    net.conv = make()
    found = look(net, mode)
    assert found["bn"].feed.reason == reason
    assert reason in str(found)


class Block(nn.Module):
    """A weight of its own, beside layers: what it gives is their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.ones(4, 1, 1)), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.weight + x.sum(1, keepdim=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_part_that_holds_layers_is_not_called_a_layer(mode: str) -> None:
    net: Any = Net()
    net.conv = Block()
    found = look(net, mode)
    assert found["bn"].feed.reason == "its input is a sum"
    assert "a sum" not in str(found)  # the table has it in the column before


class Penalty(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.conv.weight.pow(2).sum()


class BiasPenalty(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.conv.bias.pow(2).sum()


class RawToo(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.bn(y), y


class Sometimes(Net):
    penalty = False

    def forward(self, x: Tensor) -> Any:
        return (super().forward(x), self.conv.weight.sum()) if self.penalty else super().forward(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Penalty, "the weight of conv is used elsewhere too"),
        (BiasPenalty, "the bias of conv is used elsewhere too"),
        (RawToo, "the output of conv is used elsewhere too"),
        (Sometimes, "with penalty=True, the weight of conv is used elsewhere too"),
    ],
)
def test_what_of_a_layer_is_used_elsewhere_is_said(cls: type[nn.Module], reason: str, mode: str) -> None:
    assert look(cls(), mode)["bn"].feed.reason == reason


def test_the_weight_that_a_weight_norm_computes_is_called_the_weight() -> None:
    net = Penalty()
    net.conv = parametrizations.weight_norm(net.conv)
    for mode in MODES:
        assert look(net, mode)["bn"].feed.reason == "the weight of conv is used elsewhere too"
