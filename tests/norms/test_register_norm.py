"""Norms of a class of one's own: told to normswap once, found, folded, saved and reverted like others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import MODES, contents, edges, randomized, relative, run
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.errors import OptionError, PlanError
from normswap.norms import registry

NODES = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(registry._INNER), dict(registry._BY_CLASS)
    yield
    for table, was in zip((registry._INNER, registry._BY_CLASS), before, strict=True):
        table.clear()
        table.update(was)
    registry._of_class.cache_clear()


class GraphNorm(nn.Module):
    """As torch_geometric's BatchNorm: it holds one, and calls the function itself for a single node."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.module = nn.BatchNorm1d(channels)
        self.allow_single_element = False

    def forward(self, x: Tensor) -> Tensor:
        if self.allow_single_element and x.size(0) <= 1:
            bn = self.module
            return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
        return self.module(x)


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.bn, self.out = nn.Linear(3, 8), GraphNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.bn(self.lin(x.flatten(1))).relu())


def test_a_class_that_nobody_told_of_is_a_suspect_that_names_its_code() -> None:
    with pytest.raises(PlanError, match=r"functional batch norm(.|\n)*normswap\.register_norm\(CLASS, like='bn'\)"):
        normswap.convert(randomized(Graph()), to="ln", example_inputs=NODES)


def test_what_hands_on_to_a_norm_is_kept_around_the_converted_one(tmp_path: Path) -> None:
    normswap.register_norm(GraphNorm, like="bn", inner="module")
    net = randomized(Graph())
    assert edges(net, "recorded", NODES) == {"bn.module": ("lin",)}
    fused = normswap.convert(net, to="fused", example_inputs=NODES)
    assert relative(run(net, NODES), run(fused, NODES)) < 1e-5
    new = normswap.convert(net, to="ln", example_inputs=NODES)
    assert isinstance(new.bn, GraphNorm)
    assert isinstance(new.bn.module, nn.GroupNorm)
    back = normswap.load(normswap.save(new, tmp_path / "net.safetensors"), Graph())
    assert contents(normswap.revert(back)) == contents(net)


@pytest.mark.parametrize("mode", MODES)
def test_its_input_may_be_used_elsewhere_all_the_same(mode: str) -> None:
    class Kept(Graph):
        def forward(self, x: Tensor) -> Tensor:
            y = self.lin(x)
            return self.out(self.bn(y).relu() + y)

    normswap.register_norm(GraphNorm, like="bn", inner="module")
    assert edges(randomized(Kept()), mode, NODES) == {}


def test_a_subclass_with_a_forward_of_its_own_is_not_meant() -> None:
    class Doubled(GraphNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    normswap.register_norm(GraphNorm, like="bn", inner="module")
    net = randomized(Graph())
    net.bn.__class__ = Doubled
    assert registry.inner_of(net.bn) is None


class SlowNorm(nn.Module):
    """The formula, written out."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, 1e-3
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            t.view(1, -1, 1, 1) for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return (x - mean) * torch.rsqrt(var + self.eps) * weight + bias


def test_a_class_with_the_tensors_of_a_norm_is_read_as_that_norm() -> None:
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), SlowNorm(4)))
    with pytest.raises(PlanError, match="does not know its formula"):
        normswap.convert(net, to="gn")
    normswap.register_norm(SlowNorm, like="bn")
    assert normswap.inspect(net)["1"].state.eps == 1e-3
    new = normswap.convert(net, to="gn")
    assert isinstance(new[1], nn.GroupNorm)
    assert new._normswap.check.passed
    assert contents(normswap.revert(new)) == contents(net)


def test_a_class_that_computes_something_else_fails_the_self_check() -> None:
    class Half(SlowNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    normswap.register_norm(Half, like="bn")
    with pytest.raises(normswap.SelfCheckError, match="self-check failed"):
        normswap.convert(randomized(nn.Sequential(nn.Conv2d(3, 4, 3), Half(4), nn.Conv2d(4, 4, 1))), to="gn")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("bn", "bn"), "expected a class of torch.nn.Module"),
        ((nn.BatchNorm2d, "bn"), "known already"),
        ((GraphNorm, "bm"), "unknown norm 'bm'"),
        ((SlowNorm, "gn"), "only norms with running statistics"),
    ],
)
def test_what_cannot_be_registered_is_told(given: tuple[object, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        normswap.register_norm(given[0], like=given[1])


def test_pytorch_geometrics_batch_norm_is_known() -> None:
    nn_of = pytest.importorskip("torch_geometric.nn", reason="needs torch_geometric")
    net = Graph()
    net.bn = nn_of.BatchNorm(8)
    net = randomized(net)
    new = normswap.convert(net, to="ln", example_inputs=NODES)
    assert [s.producers for s in new._normswap.plan.steps] == [("lin",)]
    net.bn.allow_single_element = True
    with pytest.raises(PlanError, match="functional batch norm"):
        normswap.convert(net, to="ln", example_inputs=NODES)
