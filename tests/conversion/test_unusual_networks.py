"""Converting networks that are built in unusual ways: peers' edge cases."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from convertible import TARGETS, converted
from helpers import Net, X, classes, contents, conv_bn, fingerprint, randomized
from torch import Tensor, nn

import normswap
from normswap.errors import NormswapError, PlanError


def test_named_sequentials_lists_and_dicts_keep_their_names_and_order() -> None:
    class Containers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.named = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), norm0=nn.BatchNorm2d(4), act=nn.ReLU()))
            self.listed = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)])
            self.keyed = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1), "bn": nn.BatchNorm2d(4)})

        def forward(self, x: Tensor) -> Tensor:
            x = self.listed[1](self.listed[0](self.named(x)))
            return self.keyed["bn"](self.keyed["conv"](x))

    net = randomized(Containers())
    names = [name for name, _ in net.named_modules()]
    new = converted(net, "gn")
    assert [name for name, _ in new.named_modules()] == names
    assert all(isinstance(m, nn.GroupNorm) for m in (new.named.norm0, new.listed[1], new.keyed["bn"]))
    assert [step.transfer for step in new._normswap.plan.steps] == ["fold"] * 3


def test_a_parent_whose_add_module_and_setattr_raise_is_converted() -> None:
    class Stubborn(nn.Sequential):
        def add_module(self, name: str, module: nn.Module | None) -> None:
            if getattr(self, "closed", False):
                raise RuntimeError("no")
            super().add_module(name, module)

        def __setattr__(self, name: str, value: object) -> None:
            if isinstance(value, nn.Module):
                raise RuntimeError("no")
            super().__setattr__(name, value)

    net = Stubborn(*conv_bn(8)).eval()
    net.closed = True
    assert isinstance(converted(net, "gn", inplace=True)[1], nn.GroupNorm)


def test_a_convolution_used_twice_is_not_folded_into_and_a_norm_used_twice_is() -> None:
    class Reused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.bn, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.conv(self.bn(self.conv(x))))

    new = converted(randomized(Reused()), "ln")
    assert [(s.path, s.transfer) for s in new._normswap.plan.steps] == [("bn", "prescale"), ("other", "prescale")]
    assert new._normswap.check.passed

    class ReusedNorm(Reused):
        def forward(self, x: Tensor) -> Tensor:
            return self.other(x) + self.bn(self.conv(self.bn(self.conv(x))))

    new = converted(randomized(ReusedNorm()), "ln")
    assert [(s.path, s.transfer) for s in new._normswap.plan.steps] == [("bn", "fold"), ("other", "prescale")]
    assert new._normswap.check.passed


def test_a_network_without_any_norm_is_an_error() -> None:
    with pytest.raises(PlanError, match="Sequential has no norm layer"):
        normswap.convert(nn.Sequential(nn.Conv2d(3, 4, 1)), to="gn")


def test_a_model_that_cannot_be_copied_names_inplace_and_converts_in_place() -> None:
    class Single(Net):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("I am the only one")

    net = randomized(Single())
    with pytest.raises(NormswapError, match=r"Single cannot be deep-copied .*\n.*inplace=True"):
        normswap.convert(net, to="ln")
    assert classes(net) == ["Single", "Conv2d", "BatchNorm2d"]
    assert normswap.convert(net, to="ln", inplace=True)._normswap.check.passed


@pytest.mark.parametrize("to", TARGETS)
def test_the_original_is_untouched(to: str) -> None:
    net = nn.Sequential(conv_bn(8), nn.ReLU(), nn.BatchNorm2d(8)).train()
    before = fingerprint(net)
    new = converted(net, to)
    assert fingerprint(net) == before
    mine = {t.data_ptr() for t in (*new.parameters(), *new.buffers())}
    assert not mine & {t.data_ptr() for t in (*net.parameters(), *net.buffers())}


def test_memory_format_is_kept() -> None:
    net = conv_bn(8).to(memory_format=torch.channels_last)
    assert converted(net)[0].weight.is_contiguous(memory_format=torch.channels_last)
    reverted = normswap.revert(converted(net))
    assert reverted[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert contents(reverted) == contents(net)


def test_tied_weights_elsewhere_stay_tied() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(super().forward(x).mean((2, 3))))

    new = converted(randomized(Tied()), "ln")
    assert new.a.weight is new.b.weight


def test_the_converted_network_trains_on_a_batch_of_one() -> None:
    net = nn.Sequential(conv_bn(8), nn.Flatten(), nn.Linear(8 * 64, 2))
    new = converted(net, "gn").train()
    optimizer = torch.optim.SGD(new.parameters(), lr=0.01)
    before = contents(new)
    new(X[:1]).square().sum().backward()
    optimizer.step()
    assert all(before[name] != value for name, value in contents(new).items())
