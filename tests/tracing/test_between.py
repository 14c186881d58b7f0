"""What stands between a layer and its norm and is not in the way of a fold: nothing, and a cut of positions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    MODES,
    Net,
    X,
    bn_eval,
    contents,
    edges,
    grouped,
    look,
    needs_known_instructions,
    randomized,
    relative,
    run,
)
from torch import Tensor, nn
from torch.nn import functional as F

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


# --- positions cut away -------------------------------------------------------------------------------------------


class Cut(nn.Module):
    """What a convolution makes, cut, and normalized."""

    def __init__(self, cut: Callable[[Tensor], Tensor], channels: int = 4, conv: type[nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.cut = conv(3, 4, 3, padding=2), cut
        self.bn = (nn.BatchNorm1d if conv is nn.Conv1d else nn.BatchNorm2d)(channels)
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.cut(self.conv(x)))


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "the last dimension": lambda y: y[:, :, :, :-2],
    "the one before it": lambda y: y[:, :, 1:],
    "from behind": lambda y: y[..., 1:-1],
    "both from behind": lambda y: y[..., ::2, 2:],
    "made contiguous": lambda y: y[:, :, :-2, :-2].contiguous(),
    "one after another": lambda y: y[:, :, :-2][..., :-2],
    "to a size": lambda y: y[:, :, : y.size(2) - 2, : y.shape[-1] - 2],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", WHOLE)
def test_a_convolution_is_found_through_a_cut_of_positions(case: str, mode: str) -> None:
    assert edges(Cut(WHOLE[case]), mode) == {"bn": ("conv",)}


@pytest.mark.parametrize("case", WHOLE)
@torch.no_grad()
def test_folded_through_a_cut_it_computes_the_same_and_is_undone(case: str) -> None:
    net = Cut(WHOLE[case])
    wanted = bn_eval(net.bn, net.cut(net.conv(X)))
    fused = normswap.convert(net, "fused", example_inputs=X)
    assert type(fused.bn) is nn.Identity
    torch.testing.assert_close(fused(X).double(), wanted, rtol=1e-4, atol=1e-5)
    model = normswap.convert(net, "gn", groups=2, example_inputs=X)
    shape = (1, -1, 1, 1)
    plain = (wanted - net.bn.bias.double().view(shape)) / net.bn.weight.double().view(shape)
    expected = grouped(plain, 2, model.bn.eps, net.bn.weight, net.bn.bias)
    torch.testing.assert_close(model(X).double(), expected, rtol=1e-4, atol=1e-5)
    assert contents(normswap.revert(model)) == contents(net)


OTHERWISE: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {  # with the norm's channels
    "channels": (lambda y: y[:, :3], 3),
    "channels from behind": (lambda y: y[..., :3, :, :], 3),
    "channels in another order": (lambda y: y[:, [1, 0, 3, 2], 1:], 4),
    "positions in an order of their own": (lambda y: y[:, :, [0, 2]], 4),
    "padded after": (lambda y: F.pad(y[:, :, 1:], (1, 1)), 4),
    "changed after": (lambda y: y[:, :, 1:] * 2, 4),
    "turned after": (lambda y: y[:, :, 1:5].transpose(1, 2), 4),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", OTHERWISE)
def test_what_may_take_channels_apart_or_do_more_is_in_the_way(case: str, mode: str) -> None:
    assert edges(Cut(*OTHERWISE[case]), mode) == {}


@pytest.mark.parametrize("mode", MODES)
def test_a_part_of_the_channels_is_called_a_part(mode: str) -> None:
    reason = look(Cut(*OTHERWISE["channels"]), mode)["bn"].feed.reason
    assert reason == "its input is a part of the output of conv, maybe not with all channels"


class ReadUncut(Cut):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(self.cut(y)).sum() + y.sum()


class ReadCut(Cut):
    def forward(self, x: Tensor) -> Tensor:
        y = self.cut(self.conv(x))
        return self.bn(y) + y


class TheRestToo(Cut):
    """What is cut off is used as well."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(self.cut(y)).sum() + y[..., -1].sum()


class ChangedInPlace(Cut):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.cut(y)
        y.mul_(2)
        return self.bn(z)


class OtherNorm(Cut):
    """Another norm reads another part."""

    def __init__(self, cut: Callable[[Tensor], Tensor]) -> None:
        super().__init__(cut)
        self.bn2 = randomized(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(self.cut(y)).sum() + self.bn2(y[..., 2:]).sum()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cls", [ReadUncut, ReadCut, TheRestToo, ChangedInPlace, OtherNorm])
def test_a_convolution_is_not_claimed_where_what_is_cut_has_other_uses(cls: type[Cut], mode: str) -> None:
    assert edges(cls(WHOLE["from behind"]), mode) == {}


@pytest.mark.parametrize("mode", MODES)
def test_all_parts_of_an_output_may_go_to_the_one_norm(mode: str) -> None:
    class Halves(Cut):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y[..., :4]).sum() + self.bn(y[..., 4:]).sum()

    assert edges(Halves(WHOLE["from behind"]), mode) == {"bn": ("conv",)}


@pytest.mark.parametrize("mode", MODES)
def test_two_dimensions_from_behind_are_more_than_a_sequence_has(mode: str) -> None:
    x = torch.randn(2, 3, 9)
    assert edges(Cut(lambda y: y[..., 0:, :-2], conv=nn.Conv1d), mode, x) == {}
    assert edges(Cut(lambda y: y[..., :-2], conv=nn.Conv1d), mode, x) == {"bn": ("conv",)}


def test_a_linear_layer_whose_steps_are_cut_is_not_claimed() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(5, 4), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.fc(x)[:, :, :-1])

    for mode in MODES:
        assert edges(Steps(), mode, torch.randn(2, 3, 5)) == {}


class Chomp(nn.Module):
    """TCN (Bai et al. 2018): cuts the surplus of a causal convolution off."""

    def __init__(self, surplus: int) -> None:
        super().__init__()
        self.surplus = surplus

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.surplus].contiguous()


def tcn() -> nn.Sequential:
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for width, dilation in ((3, 1), (8, 2)):
        conv = nn.Conv1d(width, 8, 3, padding=2 * dilation, dilation=dilation)
        blocks += [nn.utils.parametrizations.weight_norm(conv), Chomp(2 * dilation), nn.BatchNorm1d(8), nn.ReLU()]
    return randomized(nn.Sequential(*blocks, nn.Conv1d(8, 2, 1)))


def test_a_temporal_convolutional_network_is_folded_calibrated_and_undone(tmp_path: Path) -> None:
    net, x = tcn(), torch.randn(8, 3, 20)
    fused = normswap.convert(net, "fused")
    assert [step.producers for step in fused._normswap.plan.steps] == [("0",), ("4",)]
    assert relative(run(net, x), run(fused, x)) < 1e-5
    for method in ("moments", "balance", "refit"):
        model = normswap.convert(net, "gn", groups=2)
        normswap.calibrate(model, net, x, method=method, batch_size=8)
        back = normswap.load(normswap.save(model, tmp_path / f"{method}.safetensors"), tcn())
        assert torch.equal(run(back, x), run(model, x))
        assert contents(normswap.revert(back)) == contents(net)


def test_a_hook_on_what_cuts_sees_what_would_be_folded() -> None:
    net, x = tcn(), torch.randn(2, 3, 20)
    net[1].register_forward_hook(lambda *given: None)
    for mode in MODES:
        assert edges(net, mode, x) == {"6": ("4",)}
