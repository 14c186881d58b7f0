"""What feeds each norm. One rule above all: an edge that is claimed is there, and nothing else hangs on it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import MODES, Net, Residual, X, edges, look, randomized
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.inspection.example_inputs import guess_inputs
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


def test_a_linear_layer_is_not_folded_into_where_what_a_run_flattened_to_rows_may_have_had_more_dimensions() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = mlp()

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x * 2 if float(x.sum()) > 1e9 else x)
            return self.bn(y.flatten(0, 1))  # (N * A, B, 8) of (N, A, B, 8): B are the norm's channels

    net = randomized(Rows()).eval()
    inputs: Any = guess_inputs(net)
    assert inputs[0].dim() == 3
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(normswap.convert(net, "fused", check=False)(x), net(x))


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


class Shaped(nn.Module):
    """What `shape` makes of an input that nobody guesses, through two linear layers and their norms."""

    def __init__(self, shape: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.shape = shape
        self.body = mlp(nn.ReLU(), nn.Dropout(), *mlp())

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[0] == 7, "seven")
        return self.body(self.shape(x))


def unsqueezed_later(x: Tensor) -> Tensor:
    y = x.reshape(-1, 8)
    y.unsqueeze_(1)
    return y


TWO_DIMENSIONS = {
    "view": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: x.reshape(-1, x.shape[-1]),
    "reshape to a tuple": lambda x: x.reshape((x.shape[0], 8)),
    "torch.reshape": lambda x: torch.reshape(x, (-1, 8)),
    "flatten": lambda x: x.flatten(1),
    "torch.flatten": lambda x: torch.flatten(x, start_dim=1),
    "by values after": lambda x: torch.tanh(x.flatten(1)) * 2 + x.flatten(1).relu(),
    "joined": lambda x: torch.cat([x.flatten(1)[:, :4] * 1, x.flatten(1)], 1).reshape(-1, 8),
}
MAYBE_MORE = {
    "as it is": lambda x: x,
    "three sizes": lambda x: x.reshape(x.shape[0], -1, 8),
    "a shape": lambda x: x.view(x.shape),
    "flattened from the third": lambda x: x.flatten(2),
    "flattened to the second": lambda x: x.flatten(0, 1),
    "flattened from the second to the third": lambda x: x.flatten(1, 2),
    "one more": lambda x: x.reshape(-1, 8).unsqueeze(1),
    "one more, in place": unsqueezed_later,
    "joined with more": lambda x: x.reshape(-1, 8) + x,
    "summed": lambda x: x.flatten(1).sum(),
}


@pytest.mark.parametrize("shape", TWO_DIMENSIONS)
def test_a_linear_layer_is_found_where_the_code_makes_vectors_of_any_input(shape: str) -> None:
    net = Shaped(TWO_DIMENSIONS[shape]).eval()
    assert guess_inputs(net) is None
    assert edges(net, "symbolic") == {"body.1": ("body.0",), "body.5": ("body.4",)}


@pytest.mark.parametrize("shape", MAYBE_MORE)
def test_a_linear_layer_is_not_folded_into_where_the_code_may_make_more_than_vectors(shape: str) -> None:
    assert edges(Shaped(MAYBE_MORE[shape]), "symbolic") == {}


def test_a_linear_layer_is_not_folded_into_where_a_hook_may_give_vectors_another_dimension() -> None:
    net = Shaped(TWO_DIMENSIONS["flatten"])
    net.body[2].register_forward_hook(lambda m, args, out: out.unsqueeze(1))
    assert edges(net, "symbolic") == {}


def test_a_linear_layer_is_not_folded_into_where_another_way_of_the_code_gives_more_than_vectors() -> None:
    class Flagged(Shaped):
        raw = False

        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.shape[0] == 7, "seven")
            return self.body(x if self.raw else x.flatten(1))

    assert edges(Flagged(nn.Identity()), "symbolic") == {}
    flagged = Flagged(nn.Identity())
    flagged.body = nn.Sequential(flagged.body, nn.Flatten(), *mlp())  # which makes vectors of anything
    assert edges(flagged, "symbolic") == {"body.3": ("body.2",)}


def test_a_linear_layer_is_not_folded_into_behind_a_part_that_another_way_gives_more_than_vectors() -> None:
    class Flagged(Shaped):
        raw = False

        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.shape[0] == 7, "seven")
            return self.body[1](self.body[0](self.shape(x if self.raw else x.flatten(1))))

    assert edges(Flagged(), "symbolic") == {}


class Sometimes(nn.Module):
    def __init__(self, otherwise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.otherwise = otherwise

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else self.otherwise(x)


def test_a_linear_layer_is_folded_into_behind_a_part_that_branches_only_where_each_branch_makes_vectors() -> None:
    assert edges(Shaped(Sometimes(lambda x: x.reshape(-1, 8))), "symbolic") != {}
    assert edges(Shaped(Sometimes(lambda x: x * 2)), "symbolic") == {}


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
