"""Convolutions of a class of one's own: folded into where they are one convolution by their weight."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
from helpers import MODES, Net, X, contents, edges, needs_known_instructions, randomized, relative, run
from torch import Tensor, nn
from torch.nn import functional as F

import normswap


class StaticSame(nn.Conv2d):
    """efficientnet_pytorch: padding by a layer, chosen when it is built."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((1, 2, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class DynamicSame(nn.Conv2d):
    """Padding computed from the size of the input, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        ih, iw = x.size()[-2:]
        kh, kw = self.weight.size()[-2:]
        pad_h = max((math.ceil(ih / self.stride[0]) - 1) * self.stride[0] + kh - ih, 0)
        pad_w = max((math.ceil(iw / self.stride[1]) - 1) * self.stride[1] + kw - iw, 0)
        if pad_h > 0 or pad_w > 0:
            x = F.pad(x, [pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def pad_same(x: Tensor, kernel: int) -> Tensor:
    if kernel > 1:
        x = F.pad(x, [0, kernel - 1, 0, kernel - 1], mode="circular")
    return x


class Helped(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(pad_same(x, self.kernel_size[0]), self.weight, self.bias)


class Coordinates(nn.Conv2d):
    """CoordConv: it adds to its input where each position is."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.linspace(-1, 1, x.shape[-2]).view(1, 1, -1, 1)
        return super().forward(x + rows)


class Transposed(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0, 1, 0)))


OWN = [StaticSame, DynamicSame, Helped, Coordinates, Transposed]


def net_with(cls: type[nn.Module], **options: object) -> nn.Module:
    return randomized(nn.Sequential(cls(4, 8, 3, **options), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)))


@needs_known_instructions
@pytest.mark.parametrize("options", [{"bias": False}, {"stride": 2}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("cls", OWN)
def test_one_that_only_prepares_its_input_is_folded_into_saved_and_reverted(
    cls: type[nn.Module], options: dict[str, object], tmp_path: Path
) -> None:
    net = net_with(cls, **options)
    for to in ("gn", "fused"):
        new = normswap.convert(net, to=to)
        assert [s.producers for s in new._normswap.plan.steps] == [("0",)]
        assert new._normswap.check.passed
        back = normswap.load(normswap.save(new, tmp_path / f"{to}.safetensors"), net_with(cls, **options))
        assert contents(back) == contents(new)
        assert contents(normswap.revert(back)) == contents(net)
        for size in (5, 8, 17):  # sizes that nobody has looked at
            x = torch.randn(2, 4, size, size)
            assert torch.equal(run(net, x), run(normswap.revert(copy.deepcopy(new)), x))
            if to == "fused":
                assert relative(run(net, x), run(new, x)) < 1e-5


@pytest.mark.parametrize("cls", OWN)
def test_on_a_python_whose_instructions_are_not_known_none_is_folded_into(
    cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unseen(cls):
        pass

    monkeypatch.setattr("normswap.tracing.followed.KNOWN", ("cpython", set()))
    new = normswap.convert(net_with(Unseen), to="gn")
    assert [s.producers for s in new._normswap.plan.steps] == [()]
    assert new._normswap.check.passed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cls", OWN)
def test_an_edge_from_one_is_claimed_by_the_rules_of_all(cls: type[nn.Module], mode: str) -> None:
    class Twice(Net):
        def __init__(self, used_twice: bool) -> None:
            super().__init__()
            self.conv, self.twice = cls(3, 4, 3), used_twice

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + y if self.twice else self.bn(y)

    class WeightElsewhere(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * self.conv.weight.mean()

    tied = Twice(False)
    tied.other = cls(3, 4, 3)
    tied.other.weight = tied.conv.weight
    assert edges(Twice(True), mode) == {}
    assert edges(WeightElsewhere(False), mode) == {}
    assert edges(tied, mode) == {}


@needs_known_instructions
def test_it_is_found_on_the_meta_device_too() -> None:
    with torch.device("meta"):
        net = nn.Sequential(DynamicSame(4, 8, 3), nn.BatchNorm2d(8)).eval()
    assert edges(net, "symbolic") == {"1": ("0",)}


# --- what is not one convolution by its weight ------------------------------------------------------------------


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Residue(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean()


class InPlace(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


class ByWeight(nn.Conv2d):
    """The input is prepared by the size of the weight, told by no operation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / self.weight.data.norm())


class Squeezed(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :4]


class Repeated(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(super().forward(x)[:, :4], (1, 1, 1, 1)))


class Forgetful(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return x.repeat(1, 2, 1, 1)


class Ungrateful(nn.Conv2d):
    """It has no use for a bias that it is given later."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class Large(nn.Conv2d):
    """Another weight for large inputs."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if x.shape[-1] > 100:
            w = w * 2
        return self._conv_forward(x, w, self.bias)


class LargeAfter(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if x.shape[-1] > 100:
            y = y * 2
        return y


class LargeReturn(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 100:
            return x.repeat(1, 2, 1, 1)
        return super().forward(x)


class LargeExpression(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 2, 1, 1) if x.shape[-1] > 100 else super().forward(x)


class LargeMethod(nn.Conv2d):
    def kernel(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 100:
            return self.weight * 2
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.kernel(x), self.bias)


def kernel_of(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv.weight * 2 if x.shape[-1] > 100 else conv.weight


class LargeHelper(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, kernel_of(self, x), self.bias)


def convolved(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    y = F.conv2d(x, kernel, bias)
    if x.shape[-1] > 100:
        y = y + 1
    return y


class LargeHelperAfter(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return convolved(x, self.weight, self.bias)


class OtherWeights(nn.Conv2d):
    """One of two weights, chosen without a branch."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.large = nn.Parameter(torch.randn_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, (self.weight, self.large)[x.shape[-1] > 100], self.bias)


class OtherWeightsBelow(OtherWeights):
    def __init__(self, *args: object, **kwargs: object) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self.below = nn.Conv2d(4, 8, 3)

    @property
    def large(self) -> Tensor:
        return self.below.weight


class Flagged(nn.Conv2d):
    doubled = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if self.doubled else y


class Noisy(nn.Conv2d):
    """Another weight in training."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight + torch.randn_like(self.weight) if self.training else self.weight
        return self._conv_forward(x, w, self.bias)


NOT = [
    Forgetful, Scaled, Standardized, Residue, InPlace, ByWeight, Squeezed, Repeated, Ungrateful, Large, LargeAfter,
    LargeReturn, LargeExpression, LargeMethod, LargeHelper, LargeHelperAfter, OtherWeights, OtherWeightsBelow, Flagged,
    Noisy,
]  # fmt: skip


class Behind(nn.Module):
    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 4, 1), cls(4, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(self.conv(torch.zeros(1, 4, 8, 8)).shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.first(x)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cls", NOT)
def test_one_that_is_or_may_become_something_else_is_not_folded_into(cls: type[nn.Module], mode: str) -> None:
    net = randomized(Behind(cls))
    assert edges(net, mode) == {}
    new = normswap.convert(net, to="ln", example_inputs=X)
    assert new._normswap.check.passed


@needs_known_instructions
def test_hooks_and_replaced_methods_within_one_are_no_part_of_its_class() -> None:
    hooked, patched = net_with(StaticSame), net_with(Helped)
    hooked[0].static_padding.register_forward_hook(lambda module, args, out: out * 2)
    patched[0]._conv_forward = lambda x, weight, bias: F.conv2d(x, weight * 2, bias)
    assert edges(hooked, "symbolic") == edges(patched, "symbolic") == {}
    assert edges(net_with(StaticSame), "symbolic") == {"1": ("0",)}


# --- with weight norm ---------------------------------------------------------------------------------------------


def weight_normed(conv: nn.Module, form: str) -> nn.Module:
    dim = int(isinstance(conv, nn.ConvTranspose2d))
    if form == "parametrized":
        return nn.utils.parametrizations.weight_norm(conv, dim=dim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(conv, dim=dim)


def normed_net(cls: type[nn.Module], form: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    conv = weight_normed(cls(4, 8, 3, **options), form)
    return randomized(nn.Sequential(nn.Conv2d(4, 4, 1), conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)))


FORMS = ["parametrized", "hooked"]
X4 = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(3))


@needs_known_instructions
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", OWN)
def test_one_with_weight_norm_is_folded_into_saved_and_reverted(
    cls: type[nn.Module], form: str, tmp_path: Path
) -> None:
    net = normed_net(cls, form, bias=False)
    before = contents(net)
    for to in ("gn", "fused"):
        new = normswap.convert(net, to=to)
        assert [s.producers for s in new._normswap.plan.steps] == [("1",)]
        back = normswap.load(normswap.save(new, tmp_path / f"{to}.safetensors"), normed_net(cls, form, bias=False))
        assert contents(back) == contents(new)
        assert contents(normswap.revert(back)) == contents(net)
        if to == "fused":
            assert relative(run(net, X4), run(new, X4)) < 1e-5
    assert contents(net) == before


class ByGain(nn.Conv2d):
    """Large inputs are prepared by what weight norm computes the weight with."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 100:
            x = x * self.weight_g.norm()
        return super().forward(x)


class ByGainBelow(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 100:
            x = x * self.parametrizations.weight.original0.norm()
        return super().forward(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", [ByGain, ByGainBelow, *NOT])
def test_one_that_is_not_one_convolution_is_not_with_weight_norm_either(cls: type[nn.Module], form: str) -> None:
    net = Behind.__new__(Behind)
    nn.Module.__init__(net)
    net.first, net.conv = nn.Conv2d(3, 4, 1), weight_normed(cls(4, 8, 3, bias=False), form)
    net.bn = nn.BatchNorm2d(4 if cls is Squeezed else 8)
    assert edges(randomized(net), "symbolic") == {}


@needs_known_instructions
@pytest.mark.parametrize("form", FORMS)
def test_one_whose_gains_are_not_one_a_channel_or_that_has_a_computed_bias_is_not_folded_into(form: str) -> None:
    def whole(conv: nn.Module) -> nn.Module:
        if form == "parametrized":
            return nn.utils.parametrizations.weight_norm(conv, dim=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return nn.utils.weight_norm(conv, dim=None)

    computed = weight_normed(Helped(4, 8, 3), form)
    nn.utils.parametrize.register_parametrization(computed, "bias", nn.Tanh())
    for conv in (whole(Helped(4, 8, 3)), computed):
        assert edges(randomized(nn.Sequential(conv, nn.BatchNorm2d(8))), "symbolic") == {}
