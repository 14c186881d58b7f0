"""What stands between a layer and its norm and is not in the way of a fold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import MODES, Net, X, contents, edges, needs_known_instructions, randomized, relative, run
from torch import Tensor, nn

import normswap


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Placeholder(nn.Identity):
    pass


class Between(Net):
    """A convolution, something else, a norm."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.middle = middle
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.middle(self.conv(x)))


class Untraced(Between):
    """As many steps as the values say, which no symbolic run can know."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        for _ in range(int(x.abs().sum() > 0)):
            y = self.middle(y)
        return self.bn(y)


NOTHING: dict[str, Callable[[], nn.Module]] = {
    "torch's": nn.Identity,
    "with arguments": lambda: nn.Identity(54, unused=True),
    "a class of it": Placeholder,
    "somebody's own": Identity,
    "in a container": lambda: nn.Sequential(nn.Identity(), nn.Sequential()),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", NOTHING)
def test_a_layer_is_found_through_an_identity(case: str, mode: str) -> None:
    assert edges(Between(NOTHING[case]()), mode) == {"bn": ("conv",)}


@needs_known_instructions
@pytest.mark.parametrize("case", NOTHING)
def test_a_layer_is_found_through_an_identity_where_only_a_run_shows_it(case: str) -> None:
    assert edges(Untraced(NOTHING[case]()), "recorded") == {"bn": ("conv",)}


@pytest.mark.parametrize("to", ["gn", "fused"])
def test_a_network_folded_through_an_identity_is_saved_and_reverted(to: str, tmp_path: Path) -> None:
    net = Between(nn.Identity())
    new = normswap.convert(net, to=to)
    assert new._normswap.plan.steps[0].producers == ("conv",)
    if to == "fused":
        assert relative(run(net, X), run(new, X)) < 1e-5
    back = normswap.load(normswap.save(new, tmp_path / "new.safetensors"), Between(nn.Identity()))
    assert contents(back) == contents(new)
    assert contents(normswap.revert(back)) == contents(net)


class ReadBeside(Between):
    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.conv(x))
        return self.bn(y) + y


class ReadBefore(Between):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(self.middle(y)) + y


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cls", [ReadBeside, ReadBefore])
def test_what_else_reads_the_value_of_an_identity_keeps_the_layer_from_the_fold(cls: type[Between], mode: str) -> None:
    assert edges(cls(nn.Identity()), mode) == {}


class Doubling(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def doubling() -> nn.Module:
    """Another forward on the very module."""
    module = nn.Identity()
    module.forward = lambda x: 2 * x
    return module


class NamedSo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


NamedSo.__name__ = NamedSo.__qualname__ = "Identity"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [lambda: nn.Dropout(0.1), lambda: nn.Dropout(0.0), Doubling, doubling, NamedSo])
def test_what_is_or_may_become_more_than_an_identity_is_in_the_way(make: Callable[[], nn.Module], mode: str) -> None:
    assert edges(Between(make()), mode) == {}


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("case", [*NOTHING, "an empty container"])
def test_a_hook_on_an_identity_sees_what_would_be_folded(case: str, register: str) -> None:
    for cls in (Between, Untraced):
        seen: list[object] = []
        net = cls(NOTHING.get(case, nn.Sequential)())
        getattr(net.middle, register)(lambda *given, seen=seen: seen.append(given))
        assert edges(net, "recorded") == {}
    assert edges(Between(net.middle), "symbolic") == {}


def test_a_hook_on_an_identity_elsewhere_keeps_no_layer_from_the_fold() -> None:
    class Elsewhere(Between):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(self.middle(x)))

    for mode in MODES:
        net = Elsewhere(nn.Identity())
        net.middle.register_forward_hook(lambda *given: None)
        assert edges(net, mode) == {"bn": ("conv",)}
    assert torch.equal(net.middle(X), X)
