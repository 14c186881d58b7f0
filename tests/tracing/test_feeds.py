"""What feeds each norm. One rule above all: an edge that is claimed is there, and nothing else hangs on it."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
from helpers import MODES, Net, Residual, X, conv_bn, edges, fingerprint, look, randomized
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.inspection.inventory import inspect

# --- what can be folded -----------------------------------------------------------------------------------------

PLAIN = {
    "a 1d convolution": (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 9), "conv"),
    "a 2d convolution": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), (2, 3, 9, 9), "conv"),
    "a 3d convolution": (nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), (2, 3, 5, 5, 5), "conv"),
    "a grouped convolution": (nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), (2, 4, 9, 9), "conv"),
    "a depthwise convolution": (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (2, 4, 9, 9), "conv"),
    "a transposed convolution": (nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), (2, 3, 9, 9), "conv_transpose"),
    "a grouped transposed convolution": (
        nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 9), "conv_transpose",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", PLAIN)
def test_a_layer_that_feeds_only_the_norm_is_found(case: str, mode: str) -> None:
    layer, norm, shape, kind = PLAIN[case]
    net = nn.Sequential(OrderedDict(layer=layer, norm=norm))
    found = look(net, mode, torch.randn(shape))["norm"].feed
    assert (found.kind, found.producers, found.foldable) == (kind, ("layer",), True)


# --- linear layers: their channels are the last dimension, the norm's the second ---------------------------------


def mlp(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), *layers)


FIXED = {
    "flattened before": nn.Sequential(nn.Flatten(), *mlp()),
    "flattened after": mlp(nn.Flatten(), nn.Linear(8, 8)),
    "another width after": mlp(nn.Linear(8, 5), nn.BatchNorm1d(5)),
    "behind a pooled map": nn.Sequential(nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *mlp()),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("case", FIXED)
def test_a_linear_layer_is_found_where_the_network_takes_vectors_only(case: str, given: bool) -> None:
    net = FIXED[case]
    x = None if not given else torch.randn(2, 8, 6, 6) if case == "behind a pooled map" else torch.randn(2, 8)
    feeds = [layer.feed for layer in inspect(net.eval(), x).layers]
    assert [(feed.kind, feed.foldable) for feed in feeds] == [("linear", True)] * len(feeds)


@pytest.mark.parametrize("x", [None, torch.randn(3, 8), torch.randn(3, 8, 8)], ids=["none", "vectors", "sequences"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_a_linear_layer_on_inputs_of_any_rank_is_not_folded_into(norm: type[nn.Module], x: Tensor | None) -> None:
    net = randomized(nn.Sequential(nn.Linear(8, 8), norm(8), nn.ReLU()))
    assert not inspect(net, x)["1"].feed.foldable
    new = normswap.convert(net, to="ln", example_inputs=x)
    bn, made = net[1], new[1]
    for rank in ((3, 8), (3, 8, 8)):  # the statistics stand where the norm's channels are, whichever those are
        y = net[0](torch.randn(rank))
        shape = (1, -1, *[1] * (y.dim() - 2))
        mean, var = bn.running_mean.view(shape), bn.running_var.view(shape)
        seen: list[Tensor] = []
        handle = made.norm.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        made(y)
        handle.remove()
        assert torch.allclose(seen[0], (y - mean) / (var + bn.eps).sqrt(), atol=1e-5)


def test_a_linear_layer_that_no_run_reaches_is_not_folded_into() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(nn.Flatten(), nn.Linear(8, 8))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            torch._assert(y.shape[0] == 7, "seven")
            return self.body(x)

    assert not inspect(Picky().eval())["body.1"].feed.foldable
    assert inspect(Picky().eval(), (torch.randn(2, 8), torch.ones(7)))["body.1"].feed.foldable


class SharedNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv2(self.bn(self.conv(x))))


class SharedPair(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.bn(self.conv(x))))


class ReadsShapes(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        n, c = y.shape[0], y.size(1)
        return self.bn(y).reshape(n, c, -1)


class Aliased(Net):
    """Both layers have two names, and are called by either."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Sequential(self.conv, self.bn)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(x) + self.bn(self.conv(x))


class Checkpointed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, self.bn(self.conv(x)), use_reentrant=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (SharedNorm, {"bn": ("conv", "conv2")}),
        (SharedPair, {"bn": ("conv",)}),
        (ReadsShapes, {"bn": ("conv",)}),
        (Aliased, {"bn": ("conv",)}),
        (Checkpointed, {"bn": ("conv",), "body.1": ("body.0",)}),
        (Residual, {"bn1": ("conv1",), "bn2": ("conv2",)}),
    ],
)
def test_every_use_counts(net: type[nn.Module], expected: dict[str, tuple[str, ...]], mode: str) -> None:
    x = torch.randn(2, 4, 8, 8) if net is Residual else X
    assert edges(net(), mode, x) == expected


# --- what cannot ------------------------------------------------------------------------------------------------


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


class Stored(Net):
    """Keeps the convolution's output for others."""

    raw: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.raw = self.conv(x)
        return self.bn(self.raw)


class StoredInList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features.append(self.conv(x))
        return self.bn(self.features[-1])


class StoredInDict(Net):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, dict[str, Tensor]] = {"a": {}}

    def forward(self, x: Tensor) -> Tensor:
        self.cache["a"]["b"] = y = self.conv(x)
        return self.bn(y)


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
    UsedElsewhere, UsedByNameOfNorm, UsedLater, TwoNorms, InPlaceBetween, InPlaceThroughView, Augmented, ViewBetween,
    DataUsed, DetachUsed, ConvTwice, NormTwice, WeightUsed, WeightViewUsed, BiasUsed, TiedWeight, TiedBias,
    WeightNormed, SpectralNormed, OldWeightNormed, OldSpectralNormed, ParametrizedBias, SubclassedConv,
    SubclassedConvInside, PatchedConv, HookedConv, PreHookedNorm, HookedBlock, PreHookedBlock, Stored, StoredInList,
    StoredInDict, LinearOnMaps, OtherDimensions, Pooled,
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", NEVER)
def test_an_edge_that_something_else_hangs_on_is_not_claimed(case: type[nn.Module], mode: str) -> None:
    net = case()
    before = fingerprint(net.eval())
    assert edges(net, mode) == {}
    assert fingerprint(net) == before


@pytest.mark.parametrize("case", NEVER)
def test_without_the_edge_the_conversion_is_still_proven(case: type[nn.Module]) -> None:
    net = randomized(case())
    converted = normswap.convert(net, to="ln", example_inputs=X, inplace=True)
    assert converted._normswap.check.passed
    assert converted._normswap.check.layers == len(converted._normswap.plan.steps) > 0


# --- kinds ------------------------------------------------------------------------------------------------------


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of_input = nn.BatchNorm2d(3)
        self.of_norm = nn.BatchNorm2d(3)
        self.of_sum = nn.BatchNorm2d(3)
        self.of_concat = nn.BatchNorm2d(6)
        self.of_other = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.of_norm(self.of_input(x))
        z = self.of_sum(y + x)
        return self.of_other(self.of_concat(torch.cat([z, x], 1)).relu())


@pytest.mark.parametrize("mode", MODES)
def test_what_is_no_layer_is_named(mode: str) -> None:
    found = {layer.path: layer.feed for layer in look(Kinds(), mode).layers}
    assert {path: feed.kind for path, feed in found.items()} == {
        "of_input": "input", "of_norm": "norm", "of_sum": "sum", "of_concat": "concat", "of_other": "other",
    }  # fmt: skip
    assert not any(feed.foldable for feed in found.values())
    assert all(feed.reason for feed in found.values())


@pytest.mark.parametrize("mode", MODES)
def test_a_norm_that_no_run_reaches_is_unknown(mode: str) -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.BatchNorm2d(4)

    found = look(Unused(), mode)["spare"].feed
    assert (found.kind, found.foldable) == ("unknown", False)


def test_a_network_that_is_one_norm_is_fed_by_its_input() -> None:
    assert inspect(nn.BatchNorm2d(3))[""].feed.kind == "input"


# --- sizes ------------------------------------------------------------------------------------------------------


def test_dimensions_and_positions_are_known_where_the_layers_fix_them() -> None:
    net = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 4, 3), bn=nn.SyncBatchNorm(4), pool=nn.AdaptiveAvgPool2d(1), squeeze=nn.Conv2d(4, 2, 1),
            pooled=nn.SyncBatchNorm(2), flat=nn.Flatten(), linear=nn.Linear(2, 5), vector=nn.SyncBatchNorm(5),
        )
    )  # fmt: skip
    symbolic, recorded = inspect(net.eval()), inspect(net, X)
    for found in (symbolic, recorded):
        assert [found[p].feed.dims for p in ("bn", "pooled", "vector")] == [2, 2, 1]
    assert [layer.feed.positions for layer in symbolic.layers] == [None, None, None]
    assert [layer.feed.positions for layer in recorded.layers] == [36, 1, 1]


# --- the last norm of a residual branch -----------------------------------------------------------------------------


def last_norms(net: nn.Module, x: Tensor | None = None) -> list[str]:
    return [layer.path for layer in inspect(net.eval(), x).layers if layer.feed.last_of_branch]


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_the_last_norm_of_every_residual_branch_is_found(name: str, last: str) -> None:
    models = pytest.importorskip("torchvision.models")
    net = models.get_model(name, weights=None)
    expected = [path for path, _ in net.named_modules() if path.startswith("layer") and path.endswith(last)]
    assert last_norms(net) == expected
    assert last_norms(net, torch.randn(1, 3, 64, 64)) == expected


def test_the_last_norm_of_inverted_residuals_is_found_where_there_is_a_shortcut() -> None:
    models = pytest.importorskip("torchvision.models")
    net = models.mobilenet_v2(weights=None)
    blocks = [(path, m) for path, m in net.named_modules() if getattr(m, "use_res_connect", False)]
    assert last_norms(net) == [f"{path}.conv.3" for path, _ in blocks]


def test_a_norm_on_the_shortcut_is_not_the_last_of_the_branch() -> None:
    class Projected(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.bn1(self.conv1(x)))
            return self.down(x) + self.bn2(self.conv2(y))

    class PooledProjected(Projected):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.bn1(self.conv1(x)))
            return self.down(F.avg_pool2d(x, 1)) + self.bn2(self.conv2(y))

    x = torch.randn(1, 4, 8, 8)
    for net in (Residual(), Projected(), PooledProjected()):
        assert last_norms(net) == last_norms(net, x) == ["bn2"]


def test_a_norm_whose_output_is_used_elsewhere_is_not_the_last() -> None:
    class Shared(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
            return y + x, y

    assert last_norms(Shared()) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stem", [nn.Identity(), nn.Conv2d(4, 4, 1)])
def test_a_norm_beside_its_own_input_is_not_the_last_of_a_branch(stem: nn.Module, mode: str) -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn = stem, nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.bn(x)

    assert last_norms(Empty(), torch.randn(1, 4, 8, 8) if mode == "recorded" else None) == []


@pytest.mark.parametrize("mode", MODES)
def test_of_two_branches_of_equal_depth_neither_is_the_shortcut_of_the_other(mode: str) -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(4)[:2], conv_bn(4)[:2]

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    assert last_norms(Parallel(), X if mode == "recorded" else None) == []


def test_a_norm_before_a_plain_sum_is_not_the_last_of_a_branch() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(4), conv_bn(4)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.a[1](self.a[0](x)) + self.b[0](z)

    assert last_norms(Sum()) == []


# --- whole networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "googlenet", "shufflenet_v2_x0_5"])
def test_symbolic_and_recorded_runs_agree_on_torchvisions_networks(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    net = models.get_model(name, weights=None, **kwargs).eval()
    x = torch.randn(1, 3, 32, 32) if name == "densenet121" else torch.randn(1, 3, 64, 64)
    symbolic, recorded = edges(net, "symbolic"), edges(net, "recorded", x)
    assert symbolic == recorded
    assert len(recorded) > 0.4 * len(inspect(net, feeds=False).layers)
