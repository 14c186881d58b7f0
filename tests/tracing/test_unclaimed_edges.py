"""Edges from a layer to a norm that something else hangs on: none of them is claimed."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import MODES, Net, X, edges, fingerprint, needs_known_instructions, randomized
from holders import Stored, StoredInDict, StoredInList
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import normswap


class UsedElsewhere(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class UsedByNameOfNorm(Net):
    """A function that is called as the norm is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = self.bn
        del self.bn

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + torch.norm(y)


class UsedLater(Net):
    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.after(self.bn(y).relu()), y


class TwoNorms(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + self.bn2(y)


class InPlaceBetween(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.add_(1)
        return self.bn(y)


class InPlaceThroughView(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.view(-1).mul_(2)
        return self.bn(y)


class Augmented(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += x.mean()
        return self.bn(y)


class ViewBetween(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).view(4, 2, 8, 8))


class DataUsed(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y.data.mean()


class DetachUsed(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y.detach().mean()


class ConvTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(x * 2)


class NormTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.bn(self.conv(x)).relu())


class WeightUsed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(self.bn(self.conv(x)), self.conv.weight, padding=1)


class WeightViewUsed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.conv.weight.data.abs().mean()


class BiasUsed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv.bias.view(1, -1, 1, 1)


class TiedWeight(Net):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Conv2d(3, 4, 3, padding=1)
        self.twin.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.twin(x)


class TiedBias(TiedWeight):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Conv2d(3, 4, 3, padding=1)
        self.twin.bias = self.conv.bias


class WeightNormed(Net):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.conv)


class WeightNormedUntraced(WeightNormed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(x.mean())


class NormedWeightUsed(WeightNormed):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.conv.weight.data.abs().mean()


class NormedWeightCached(WeightNormed):
    """The weight that is read was computed within the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        with nn.utils.parametrize.cached():
            return self.bn(self.conv(x)) * self.conv.weight.data.abs().mean()


class NormedWeightCachedUntraced(NormedWeightCached):
    """No trace shows it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(x.mean())


class GainUsed(WeightNormed):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.conv.parametrizations.weight.original0.mean()


class TiedGain(WeightNormed):
    def __init__(self) -> None:
        super().__init__()
        self.twin = parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.twin.parametrizations.weight.original0 = self.conv.parametrizations.weight.original0

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.twin(x)


class TiedWeightNorm(TiedGain):
    def __init__(self) -> None:
        super().__init__()
        self.twin.parametrizations = self.conv.parametrizations


class OneGainForAll(Net):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.conv, dim=None)


class GainsOfInputs(Net):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.conv, dim=1)


class TransposedGainsOfInputs(Net):
    """Of a transposed convolution, whose output channels are the weight's second dimension, by default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.ConvTranspose2d(3, 4, 3, padding=1))


class TransposedInGroups(Net):
    """As many gains as a group has output channels, for all groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.ConvTranspose2d(3, 6, 3, padding=1, groups=3), dim=1)
        self.bn = nn.BatchNorm2d(6)


class WeightNormedTwice(WeightNormed):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrize.register_parametrization(self.conv, "weight", nn.Tanh())


class SpectralNormed(Net):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.conv)


class OldWeightNormed(Net):
    """A forward pre-hook computes the weight."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(self.conv)


class OldWeightNormedUntraced(OldWeightNormed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(x.mean())


class OldNormedWeightUsed(OldWeightNormed):
    """Read where the hook has left it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.conv.weight.data.abs().mean()


class OldNormedWeightUsedUntraced(OldNormedWeightUsed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(x.mean())


class OldNormedWeightReadBeforeUntraced(OldWeightNormed):
    """The weight that the hook left the last time."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.conv.weight.abs().mean() * float(x.mean())
        return self.bn(self.conv(x)) * size


class OldTransposedGainsOfInputs(Net):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.conv = nn.utils.weight_norm(nn.ConvTranspose2d(3, 4, 3, padding=1))


class OldWeightNormedAndHooked(OldWeightNormed):
    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_pre_hook(lambda m, a: (a[0] + 1,))


class OldSpectralNormed(Net):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.spectral_norm(self.conv)


class ParametrizedBias(Net):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrize.register_parametrization(self.conv, "bias", nn.Tanh())


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.norm(), bias)


class SubclassedConv(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = OwnConv(3, 4, 1)


class SubclassedConvInside(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = OwnConvForward(3, 4, 1)


class PatchedConv(Net):
    """A forward put on the instance, as accelerate and many quick fixes do."""

    def __init__(self) -> None:
        super().__init__()
        original = self.conv.forward
        self.conv.forward = lambda x: original(x).square()


class HookedConv(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(lambda m, a, out: out * 2)


class PreHookedNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn.register_forward_pre_hook(lambda m, a: (a[0] + 1,))


class HookedBlock(Net):
    """A hook takes features from a block that ends in the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(self.conv)
        del self.conv
        self.block.register_forward_hook(lambda m, a, out: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.block(x))


class PreHookedBlock(Net):
    """A hook looks at what goes into a block that begins with the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(self.bn, nn.ReLU())
        del self.bn
        self.block.register_forward_pre_hook(lambda m, a: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.conv(x))


class LinearOnMaps(Net):
    """A linear layer works on the last dimension, the norm on the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(8, 3)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class OtherDimensions(Net):
    """A 2d convolution on an unbatched image, read as a batch of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x[0]).flatten(0, 1)) if x.dim() == 4 else x


class Pooled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.max_pool2d(self.conv(x), 2))


NEVER = [
    UsedElsewhere, UsedByNameOfNorm, UsedLater, TwoNorms, InPlaceBetween, InPlaceThroughView, Augmented,
    ViewBetween, DataUsed, DetachUsed, ConvTwice, NormTwice, WeightUsed, WeightViewUsed, BiasUsed, TiedWeight,
    TiedBias, NormedWeightUsed, NormedWeightCached, GainUsed, TiedGain, TiedWeightNorm, OneGainForAll,
    GainsOfInputs, TransposedGainsOfInputs, TransposedInGroups, WeightNormedTwice, OldNormedWeightUsed,
    OldNormedWeightUsedUntraced, OldNormedWeightReadBeforeUntraced, NormedWeightCachedUntraced,
    OldTransposedGainsOfInputs, OldWeightNormedAndHooked, SpectralNormed, OldSpectralNormed, ParametrizedBias,
    SubclassedConv, SubclassedConvInside, PatchedConv, HookedConv, PreHookedNorm, HookedBlock, PreHookedBlock,
    Stored, StoredInList, StoredInDict, LinearOnMaps, OtherDimensions, Pooled,
]  # fmt: skip
UNTRACED = [WeightNormedUntraced, OldWeightNormedUntraced]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", NEVER)
def test_an_edge_that_something_else_hangs_on_is_not_claimed(case: type[nn.Module], mode: str) -> None:
    net = case()
    before = fingerprint(net.eval())
    assert edges(net, mode) == {}
    assert fingerprint(net) == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [
    WeightNormed, OldWeightNormed, *(pytest.param(case, marks=needs_known_instructions) for case in UNTRACED)
])  # fmt: skip
def test_a_layer_whose_weight_norm_has_a_gain_for_each_output_channel_is_claimed(
    case: type[nn.Module], mode: str
) -> None:
    net = case()
    before = fingerprint(net.eval())
    assert edges(net, mode) == {"bn": ("conv",)}
    assert fingerprint(net) == before


@pytest.mark.parametrize("case", NEVER)
def test_without_the_edge_the_conversion_is_still_proven(case: type[nn.Module]) -> None:
    net = randomized(case())
    converted = normswap.convert(net, to="ln", example_inputs=X, inplace=True)
    assert converted._normswap.check.passed
    assert converted._normswap.check.layers == len(converted._normswap.plan.steps) > 0
