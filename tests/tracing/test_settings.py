"""What another setting of a flag would change costs a fold, and what it would not costs none."""

from __future__ import annotations

import pytest
from helpers import MODES, Net, edges, look
from torch import Tensor, nn


class BuiltByName(nn.Module):
    """The constructor has added the norm, under a name that it puts together: without the flag there would be none."""

    def __init__(self, normalize: bool = True) -> None:
        super().__init__()
        self.with_norm, self.conv = normalize, nn.Conv2d(3, 4, 3)
        if self.with_norm:
            self.norm_name = "_".join(["bn", "1"][:1])
            self.add_module(self.norm_name, nn.BatchNorm2d(4))

    @property
    def norm(self) -> nn.Module:
        return self.get_submodule(self.norm_name)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.with_norm:
            x = self.norm(x)
        return x


class DomainsAdded(Net):
    """The flag added a second norm so, and chooses between the two all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.adv = True
        if self.adv:
            self.add_module("_".join(["bn", "adv"]), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn_adv if self.adv else self.bn)(self.conv(x))


class RaisedLater(Net):
    """The flag was raised after the constructor had asked for it, and added nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.more = False
        if self.more:
            self.add_module("_".join(["bn", "more"]), nn.BatchNorm2d(4))
        self.more = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) if self.more else x


class Early(nn.Module):
    """Gives its convolution's output, and with a flag what it had before, beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.both = nn.Conv2d(3, 4, 3), False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = x * 2
        return (self.conv(x), x) if self.both else self.conv(x)


class EndsInAConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.bn = Early(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.block(x))


class Swapping(nn.Module):
    """Gives two convolutions' outputs, in this order or that."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2, self.turned = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.conv(x), self.conv2(x)
        return (second, first) if self.turned else (first, second)


class Swapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.bn, self.bn2 = Swapping(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.block(x)
        return self.bn(first).relu() + self.bn2(second).relu()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "layer"), [(BuiltByName, "conv"), (EndsInAConvolution, "block.conv")])
def test_a_flag_that_changes_no_reader_costs_no_fold(case: type[nn.Module], layer: str, mode: str) -> None:
    assert edges(case(), mode) == {"bn": (layer,)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (DomainsAdded, "no run of the network showed what feeds bn, which may be conv"),
        (RaisedLater, "with more=False, the output of conv is used elsewhere too"),
        (Swapped, "with turned=True, the output of block.conv is used elsewhere too"),
    ],
)
def test_a_flag_that_changes_the_reader_costs_the_fold(case: type[nn.Module], reason: str, mode: str) -> None:
    feeds = [layer.feed for layer in look(case().eval(), mode).layers]
    assert [feed.producers for feed in feeds] == [()] * len(feeds)
    assert reason in {feed.reason for feed in feeds}
