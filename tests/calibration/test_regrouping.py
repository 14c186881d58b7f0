"""Which channels share a group: where their order is free, that changing it is exact, and that it is undone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import contents, randomized, relative, run
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.calibration.balance import Spread, factors
from normswap.calibration.calibrate import calibrate
from normswap.calibration.grouping import regrouped
from normswap.calibration.matching import Original
from normswap.calibration.moments import Moments
from normswap.calibration.norm_targets import targets_of
from normswap.calibration.permuting import chains_of, orders_of, permute
from normswap.conversion.record import record_of
from normswap.conversion.self_check import bare
from normswap.conversion.undo_record import Order
from normswap.distillation.feature_loss import Features
from normswap.errors import RevertError


class Inner(nn.Module):
    """A block with a convolution, a depthwise one and a norm between each, on a residual stream; then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.expand, self.norm1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.project, self.norm3 = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
        self.last, self.norm4 = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def between(self, x: Tensor) -> Tensor:
        return F.relu6(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x)).relu()
        y = self.between(self.norm1(self.expand(x)))
        y = self.between(self.norm2(self.depthwise(y)))
        x = x + self.norm3(self.project(y))
        x = F.adaptive_avg_pool2d(self.norm4(self.last(x)).relu(), 1)
        return self.head(x.flatten(1))


INSIDE = {("norm1", "norm2"): ("expand", "depthwise", "project"), ("norm4",): ("last", "head")}


def network(cls: type[nn.Module] = Inner) -> nn.Module:
    torch.manual_seed(0)
    model = randomized(cls())
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
    model.train()(images(40, 3))
    return model.eval()


def images(count: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.3


def chains(model: nn.Module, x: Tensor | None = None) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Of a network that is to be converted, by its norms: the layers whose channels are free."""
    x = images(2) if x is None else x
    gn = normswap.convert(model, "gn", groups=4, example_inputs=x)
    steps = {step.path: step for step in record_of(gn).plan.steps if step.transfer == "fold"}
    targets = {target.path: target for target in targets_of(gn, model) if target.path in steps}
    found = chains_of(gn, (x,), targets, steps)
    return {chain.norms: (*chain.layers, chain.consumer) for chain in found}


def test_the_order_is_free_inside_a_block_and_not_along_a_residual_stream() -> None:
    assert chains(network()) == INSIDE


class Gated(Inner):
    """Something else reads what lies between."""

    def between(self, x: Tensor) -> Tensor:
        return F.relu6(x) * x.mean((1, 2, 3), keepdim=True)


class Weighted(Inner):
    """Each channel has a slope of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.rand(16))

    def between(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.slope)


class Shuffled(Inner):
    def between(self, x: Tensor) -> Tensor:
        return F.channel_shuffle(F.relu6(x), 4)


class Sliced(Inner):
    def between(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :8].relu(), x[:, 8:]], 1)


class Kept(Inner):
    def between(self, x: Tensor) -> Tensor:
        self.seen = F.relu6(x).detach()
        return self.seen


class Auxiliary(Inner):
    """In training, another layer reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv2d(16, 1, 1)

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + self.side(x)
        return F.relu6(x)


class Flat(Inner):
    """The classifier reads every position, so that its columns are not channels."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(16, 8), nn.Linear(12 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm4(self.last(self.norm0(self.stem(x)))).relu()
        return self.head(x.flatten(1))


class Twice(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x)


class Transposed(Inner):
    """The rows of a transposed convolution's weight are its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.norm4, self.head = nn.ConvTranspose2d(8, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 5)


@pytest.mark.parametrize("cls", [Gated, Weighted, Shuffled, Sliced, Kept])
def test_where_anything_else_sees_the_channels_their_order_stays(cls: type[nn.Module]) -> None:
    assert set(chains(network(cls))) == {("norm4",)}


@pytest.mark.parametrize("cls", [Auxiliary, Flat, Twice])
def test_what_training_or_another_use_may_see_keeps_its_order(cls: type[nn.Module]) -> None:
    assert not any(norm in norms for norms in chains(network(cls)) for norm in ("norm1", "norm4"))


class AlongRows(nn.Module):
    """A linear layer mixes the columns of a map that is as wide as it has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.relu(self.norm(self.conv(x)))).mean((1, 2))


def test_a_linear_layer_takes_over_channels_only_where_they_are_its_last_dimension() -> None:
    assert chains(randomized(AlongRows()), torch.randn(2, 3, 6, 8)) == {}


def test_hooks_and_shared_weights_keep_the_order() -> None:
    hooked = network()
    hooked.depthwise.register_forward_hook(lambda module, args, out: None)
    assert set(chains(hooked)) == set()
    shared = network()
    shared.more = nn.Conv2d(8, 12, 1)
    shared.more.weight = shared.last.weight
    assert set(chains(shared)) == {("norm1", "norm2")}


def test_a_consumer_that_shares_its_weight_keeps_the_order() -> None:
    shared = network()
    shared.more = nn.Linear(12, 5)
    shared.more.weight = shared.head.weight
    assert set(chains(shared)) == {("norm1", "norm2")}


def test_norms_of_other_numbers_of_groups_keep_the_order() -> None:
    gn = normswap.convert(network(), "gn", groups=4, example_inputs=images(2))
    gn.norm2.num_groups = 2
    steps = {step.path: step for step in record_of(gn).plan.steps if step.transfer == "fold"}
    targets = {target.path: target for target in targets_of(gn, network()) if target.path in steps}
    assert [chain.norms for chain in chains_of(gn, (images(2),), targets, steps)] == [("norm4",)]


def test_moments_move_with_their_channels() -> None:
    original = Original([])
    original.moments["norm"] = Moments(2, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]))
    original.reorder("norm", Order("norm", torch.tensor([2, 0, 1])))
    moved = original.moments["norm"]
    assert (moved.mean.tolist(), moved.deviation.tolist()) == ([3.0, 1.0, 2.0], [6.0, 4.0, 5.0])


def test_factors_for_another_order_are_told_in_the_present_one() -> None:
    target = SimpleNamespace(state=SimpleNamespace(num_groups=2))
    means, gamma, order = torch.randn(20, 8).double(), torch.rand(8) + 0.5, torch.tensor([3, 5, 0, 7, 1, 2, 6, 4])
    squares = means.square() + torch.rand(20, 8).double()
    found = factors(Spread(means=[means], squares=[squares]), target, gamma, 1e-5, order)
    moved = Spread(means=[means[:, order]], squares=[squares[:, order]])
    torch.testing.assert_close(found[order], factors(moved, target, gamma[order], 1e-5))


@pytest.mark.parametrize("cls", [Inner, Transposed])
def test_another_order_computes_the_same_with_bare_norms_and_back_is_exact(cls: type[nn.Module]) -> None:
    model = network(cls)
    gn = normswap.convert(model, "gn", groups=4)
    plan = record_of(gn).plan
    steps = {step.path: step for step in plan.steps}
    found = chains_of(gn, (images(2),), {t.path: t for t in targets_of(gn, model)}, steps)
    before = contents(gn)
    orders = orders_of({chain: torch.randperm(gn.get_submodule(chain.norms[0]).num_channels) for chain in found})
    permute(gn, orders)
    assert contents(gn) != before
    with bare(gn, plan, {}):
        assert relative(run(model, images()), run(gn, images())) < 1e-5
    permute(gn, orders, back=True)
    assert contents(gn) == before


def spread_over(means: Tensor, squares: Tensor, groups: list[list[int]], eps: float) -> float:
    """The least of the objective over all signs, by trying them."""
    total = 0.0
    for group in groups:
        signs = itertools.product([1.0, -1.0], repeat=len(group))
        total += min(float((means[:, group] @ torch.tensor(s, dtype=means.dtype)).square().sum()) for s in signs)
        total += float((squares - squares.mean(0))[:, group].sum(1).square().sum()) / (2 + 2 * eps) ** 2
    return total


@pytest.mark.parametrize("seed", range(4))
def test_groups_come_close_to_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(30, 2, generator=generator).double() @ torch.randn(2, 8, generator=generator).double()
    squares = torch.rand(30, 8, generator=generator).double()
    means = means - means.mean(0)
    halves = [list(h) for h in itertools.combinations(range(8), 4) if 0 in h]
    best = min(spread_over(means, squares, [half, [c for c in range(8) if c not in half]], 1.0) for half in halves)
    order = regrouped([(means, squares)], 2, 1.0).tolist()
    assert sorted(order) == list(range(8))
    found = spread_over(means, squares, [order[:4], order[4:]], 1.0)
    as_it_was = spread_over(means, squares, [[0, 1, 2, 3], [4, 5, 6, 7]], 1.0)
    assert found <= best + 0.25 * (as_it_was - best)


@pytest.mark.parametrize("method", ["balance", "refit"])
def test_a_regrouped_network_is_saved_loaded_and_reverted_to_the_bit(method: str, tmp_path: Path) -> None:
    model = network()
    gn = normswap.convert(model, "gn", groups=4)
    calibrate(gn, model, images(), method=method)
    orders = {order.path: order for order in record_of(gn).undo.orders}
    assert set(orders) == {"norm1", "norm2", "norm4", "expand", "depthwise", "project", "last", "head"}
    normswap.save(gn, tmp_path / "gn.safetensors")
    again = normswap.load(tmp_path / "gn.safetensors", model=network())
    assert torch.equal(run(gn, images()), run(again, images()))
    calibrate(again, model, images(), method=method)
    for converted in (gn, again):
        assert contents(normswap.revert(converted)) == contents(model)


def test_a_regrouped_network_that_was_trained_reverts_approximately() -> None:
    model = network()
    gn = normswap.convert(model, "gn", groups=4)
    calibrate(gn, model, images(), method="balance")
    with torch.no_grad():
        gn.expand.weight *= 1.0001
        gn.expand.bias += 1e-5
    with pytest.raises(RevertError, match="expand"):
        normswap.revert(gn)
    assert relative(run(model, images()), run(normswap.revert(gn, strict=False), images())) < 1e-3


def test_the_order_is_known_even_where_nothing_else_was_kept(tmp_path: Path) -> None:
    model = network()
    gn, kept = normswap.convert(model, "gn", groups=4, undo=False), normswap.convert(model, "gn", groups=4)
    for each in (gn, kept):
        calibrate(each, model, images())
    normswap.save(gn, tmp_path / "gn.safetensors")
    again = normswap.load(tmp_path / "gn.safetensors", model=network())
    orders = {order.path: order for order in record_of(kept).undo.orders}
    assert orders
    for each in (gn, again):
        found = {order.path: order for order in record_of(each).undo.orders}
        assert found.keys() == orders.keys()
        assert torch.equal(found["project"].columns, orders["project"].columns)
        with pytest.raises(RevertError, match="kept nothing"):
            normswap.revert(each)


def test_verify_and_distil_compare_the_same_channels() -> None:
    model = network()
    gn = normswap.convert(model, "gn", groups=4)
    calibrate(gn, model, images(), method="balance")
    with bare_of(gn):
        layers = {layer.path: layer.error for layer in normswap.verify(model, gn, images()).layers}
        assert {"norm1", "norm2", "norm4"} <= set(layers)
        assert max(layers.values()) < 1e-4
        features = Features(model, gn)
        with features.watching():
            run(model, images())
            gn(images())
        assert features.loss() < 1e-6


def bare_of(gn: nn.Module) -> Any:
    """The network with its norms as they were right after the conversion, without what the groups disturb."""
    undo, plan = record_of(gn).undo, record_of(gn).plan
    for norm in undo.norms:
        new, rows = gn.get_submodule(norm.paths[0]), {o.path: o.rows for o in undo.orders}.get(norm.paths[0])
        for name in ("weight", "bias"):
            getattr(new, name).data.copy_(norm.tensors[name] if rows is None else norm.tensors[name][rows])
    layers = {step.path: step.producers[0] for step in plan.steps}
    for path, producer in layers.items():
        new, rows = gn.get_submodule(path), {o.path: o.rows for o in undo.orders}.get(path)
        record = next(layer for layer in undo.layers if layer.path == producer)
        bn = next(norm for norm in undo.norms if norm.paths[0] == path)
        factor = record.scale * (bn.tensors["running_var"] + 1e-5).sqrt()
        new.weight.data.div_(factor if rows is None else factor[rows]).mul_(2**0.5)
    steps = tuple(replace(s, options=replace(s.options, eps=1.0)) for s in plan.steps)
    return bare(gn, replace(plan, steps=steps), {})


def test_an_optimizer_goes_on_with_channels_in_another_order() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model.train()(images()).square().sum().backward()
    optimizer.step()
    model.eval()
    state = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    gn = normswap.convert(model, "gn", groups=4)
    calibrate(gn, model, images())
    normswap.remap_optimizer(optimizer, model, gn)
    undo = record_of(gn).undo
    scale = {layer.path: layer.scale for layer in undo.layers}
    orders = {order.path: order for order in undo.orders}
    for path in ("project", "depthwise", "head"):
        wanted = state[f"{path}.weight"] / (scale[path].view(-1, 1, 1, 1) if path in scale else 1)
        if (rows := orders[path].rows) is not None:
            wanted = wanted[rows]
        if (columns := orders[path].columns) is not None:
            wanted = wanted[:, columns]
        assert torch.allclose(optimizer.state[gn.get_submodule(path).weight]["exp_avg"], wanted, rtol=1e-5, atol=0)
    assert orders["project"].columns is not None
    assert torch.equal(optimizer.state[gn.norm4.bias]["exp_avg"], state["norm4.bias"][orders["norm4"].rows])
