"""`calibrate`: moments, exact pooling, every target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from calibrated import assert_close, assert_same_moments, images, outputs, run_at, trained
from helpers import bits, fingerprint, randomized, relative, run
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.calibration.calibrate import calibrate
from normswap.calibration.lockstep import Lockstep
from normswap.calibration.moments import Moments, moments_of
from normswap.conversion.apply import inner_norm
from normswap.conversion.record import record_of
from normswap.modules.tree import module_at

PER_SAMPLE = [("gn", {"groups": 2}), ("ln", {}), ("ln-channel", {}), ("in", {})]
STATISTICS = ["bn", "sync", "renorm"]


@pytest.mark.parametrize(("to", "options"), PER_SAMPLE)
@pytest.mark.parametrize("transfer", ["fold", "copy", "reset"])
def test_one_pass_gives_every_norm_the_moments_of_the_original(
    net: nn.Module, to: str, options: dict[str, int], transfer: str
) -> None:
    data = images()
    model = normswap.convert(net, to=to, transfer=transfer, **options)
    report = calibrate(model, net, data, batch_size=5)
    assert_same_moments(model, net, list(data.split(4)))
    assert report.passes == 1
    assert report.images == 12
    assert report.error_before > 1e-2
    assert report.error_after < 1e-5
    assert len(report.layers) == 5


def test_the_network_comes_closer_to_the_original(net: nn.Module) -> None:
    data = images(32)
    model = normswap.convert(net, to="gn", groups=1)
    before = relative(run(net, data), run(model, data))
    report = calibrate(model, net, data)
    assert relative(run(net, data), run(model, data)) < before
    assert report.drift_after < report.drift_before
    assert report.drift_after == pytest.approx(relative(run(net, data[:16]), run(model, data[:16])), rel=1e-3)


@pytest.mark.parametrize(("to", "method"), [("gn", "balance"), ("gn", "refit"), ("in", "balance"), ("bn", "balance")])
def test_the_result_depends_on_neither_batch_size_nor_order(net: nn.Module, to: str, method: str) -> None:
    data = images(13)
    results = []
    batches = [data.split(13), data.split(4), data.split(1), data[torch.randperm(13)].split(5), [data[:9], data[9:]]]
    for parts in batches:
        model = normswap.convert(net, to=to, **({"groups": 2} if to == "gn" else {}))
        calibrate(model, net, list(parts), method=method)
        results.append(model)
    for other in results[1:]:
        assert_close(results[0], other, 1e-4 if method == "refit" else 1e-5)


def test_two_layers_equal_a_computation_by_hand() -> None:
    def norm(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        parts = x.reshape(len(x), groups, -1)
        parts = (parts - parts.mean(-1, keepdims=True)) / np.sqrt(parts.var(-1, keepdims=True) + 1e-5)
        return parts.reshape(x.shape) * weight + bias

    def batch_norm(x: np.ndarray, bn: nn.BatchNorm1d) -> np.ndarray:
        mean, var, weight, bias = (
            t.detach().double().numpy() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        )
        return (x - mean) / np.sqrt(var + bn.eps) * weight + bias

    def repaired(y: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        k = np.sqrt(wanted.var(0) / y.var(0))
        shift = wanted.mean(0) - k * y.mean(0)
        return k, shift, k * y + shift

    net = randomized(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4)))
    model = normswap.convert(net, to="gn", groups=2)
    x = torch.randn(9, 3)
    first, one, _, second, two = net
    u = x.double().numpy() @ first.weight.detach().double().numpy().T + first.bias.detach().double().numpy()
    wanted_one = batch_norm(u, one)
    h = np.maximum(wanted_one, 0)
    v = h @ second.weight.detach().double().numpy().T + second.bias.detach().double().numpy()
    wanted_two = batch_norm(v, two)

    def folded(u: np.ndarray, bn: nn.BatchNorm1d) -> np.ndarray:
        return (u - bn.running_mean.double().numpy()) / np.sqrt(bn.running_var.double().numpy() + bn.eps)

    w1, b1 = one.weight.detach().double().numpy(), one.bias.detach().double().numpy()
    w2, b2 = two.weight.detach().double().numpy(), two.bias.detach().double().numpy()
    k1, c1, y1 = repaired(norm(folded(u, one), 2, w1, b1), wanted_one)
    v = np.maximum(y1, 0) @ second.weight.detach().double().numpy().T + second.bias.detach().double().numpy()
    k2, c2, _ = repaired(norm(folded(v, two), 2, w2, b2), wanted_two)

    calibrate(model, net, x, batch_size=4, method="moments")
    for layer, (k, c, w, b) in ((model[1], (k1, c1, w1, b1)), (model[4], (k2, c2, w2, b2))):
        np.testing.assert_allclose(layer.weight.detach().numpy(), k * w, rtol=1e-4)
        np.testing.assert_allclose(layer.bias.detach().numpy(), k * b + c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", STATISTICS)
def test_running_statistics_are_those_of_all_the_data(net: nn.Module, to: str) -> None:
    data = images(11, seed=3)
    model = normswap.convert(net, to=to)
    gamma = bits(inner_norm(model.stem[1]).weight)
    calibrate(model, net, [data[:7], data[7:8], data[8:]])
    inputs: dict[str, Tensor] = {}
    for path in ("stem.1", "body.0.bn1", "body.1.bn2"):
        keep = lambda module, args, path=path: inputs.update({path: args[0].double().clone()})  # noqa: E731
        inner_norm(module_at(model, path)).register_forward_pre_hook(keep)
    run(model, data)
    for path, x in inputs.items():
        norm = inner_norm(module_at(model, path))
        torch.testing.assert_close(norm.running_mean.double(), x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), x.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert bits(inner_norm(model.stem[1]).weight) == gamma


def test_batch_norms_built_without_statistics_get_them_and_the_moments() -> None:
    net = randomized(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4))
    )
    model = normswap.convert(net, to="bn", missing_statistics="later", example_inputs=images(2))
    data = images(10)
    calibrate(model, net, data, batch_size=3)
    assert_same_moments(model, net, [data])
    x = run(model[0], data).view(10, 4, 4, 4).double()
    torch.testing.assert_close(model[1].running_mean.double(), x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var.double(), x.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["frozen", "fused"])
def test_frozen_and_fused_need_nothing_and_change_nothing(net: nn.Module, to: str) -> None:
    model = normswap.convert(net, to=to)
    before = fingerprint(model)
    report = calibrate(model, net, images())
    assert fingerprint(model) == before
    assert report.layers == ()
    assert "nothing to calibrate" in str(report)


class Shared(nn.Module):
    """Two convolutions whose norms are shared by three levels, each norm behind the other: a detector's head."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.tower(x), self.tower(x[..., ::2, ::2]), self.tower(x[..., ::3, ::3] * 2)]


@pytest.mark.parametrize("batch_size", [12, 5])
def test_norms_with_several_calls_pool_their_moments(batch_size: int) -> None:
    net = trained(randomized(Shared()), images(40, seed=7))
    model = normswap.convert(net, to="gn", groups=2)
    data = images()
    report = calibrate(model, net, data, batch_size=batch_size)
    assert_same_moments(model, net, [data])
    assert [layer.calls for layer in report.layers] == [3, 3]
    assert report.passes > 1


def test_pooled_statistics_of_shared_batch_norms() -> None:
    net = randomized(Shared())
    model = normswap.convert(net, to="sync")
    data = images()
    calibrate(model, net, data, batch_size=5)
    levels = (data, data[..., ::2, ::2], data[..., ::3, ::3] * 2)
    x = torch.cat([run_at(net.tower[0], level).movedim(1, -1).flatten(0, -2) for level in levels])
    torch.testing.assert_close(model.tower[1].running_mean, x.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.tower[1].running_var, x.var(0), rtol=1e-4, atol=1e-5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.norm(self.conv(x)))
        return x


def test_recurrent_use_pools_too_and_settles() -> None:
    net = trained(randomized(Recurrent()), images(40))
    model = normswap.convert(net, to="in")
    data = images()
    report = calibrate(model, net, data, batch_size=5)
    assert report.error_after < 1e-3
    assert_same_moments(model, net, [data], 1e-3)


def test_a_dead_channel_keeps_gamma_and_gets_its_mean(net: nn.Module) -> None:
    with torch.no_grad():
        net.stem[0].weight[1] = 0
        net.body[0].bn1.weight[2] = 0
        net.stem[1].running_mean[1], net.stem[1].running_var[1] = net.stem[0].bias[1], 0
    model = normswap.convert(net, to="gn", groups=2)
    gamma = float(model.body[0].bn1.weight[2].detach())
    data = images()
    report = calibrate(model, net, data)
    rows = {order.path: order.rows for order in record_of(model).undo.orders}["body.0.bn1"]
    assert float(model.body[0].bn1.weight[int((rows == 2).nonzero())].detach()) == gamma == 0
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    paths = ["stem.1", "body.0.bn1", "body.1.bn2"]
    new, old = outputs(model, paths, [data]), outputs(net, paths, [data])
    for path in paths:
        torch.testing.assert_close(new[path].mean(0), old[path].mean(0), rtol=1e-4, atol=1e-4)
    assert {layer.path: layer.dead for layer in report.layers}["body.0.bn1"] >= 1


def test_a_norm_without_gamma_and_beta_gets_them() -> None:
    net = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()), images(40))
    model = normswap.convert(net, to="gn", groups=2)
    data = images()
    calibrate(model, net, data)
    assert model[1].affine
    assert not model[1].weight.requires_grad
    assert_same_moments(model, net, [data])


def test_prescaled_norms_and_norms_fused_with_an_activation() -> None:
    timm = pytest.importorskip("timm.layers")

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), timm.BatchNormAct2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.act(y + self.norm(y)) + y

    net = randomized(PreActivation())
    model = normswap.convert(net, to="gn", groups=2)
    seen: list[Tensor] = []
    net.act.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    data = images()
    calibrate(model, net, data)
    run(net, data)
    bn = nn.BatchNorm2d(4).eval()
    bn.load_state_dict({k: v for k, v in net.act.state_dict().items() if k in bn.state_dict()})
    wanted = run_at(bn, seen[-1]).double()
    got = outputs(model, ["act"], [data])["act"]
    torch.testing.assert_close(got.mean(0), wanted.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.std(0), wanted.std((0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(net: nn.Module, dtype: torch.dtype) -> None:
    net = net.to(dtype)
    model = normswap.convert(net, to="gn", groups=2, check=False)
    data = images()
    calibrate(model, net, data, batch_size=5)
    assert model.stem[1].weight.dtype == dtype
    assert_same_moments(model, net, [data.to(dtype)], 1e-6 if dtype == torch.float64 else 2e-2)


def test_under_autocast(net: nn.Module) -> None:
    model, plain = normswap.convert(net, to="gn", groups=2), normswap.convert(net, to="gn", groups=2)
    calibrate(plain, net, images(), batch_size=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calibrate(model, net, images(), batch_size=5)
        assert_same_moments(model, net, [images()], 2e-2)
    assert_close(model, plain, 5e-2)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_moments_pool_exactly_and_keep_precision_far_from_zero() -> None:
    x = torch.randn(7, 3, 5, 4, dtype=torch.float64) * torch.tensor([1.0, 0.01, 5.0]).view(3, 1, 1) + 40
    pooled = Moments()
    for part in x.float().split(2):
        pooled.add(moments_of(part))
    exact = x.float().double()
    torch.testing.assert_close(pooled.mean, exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(pooled.var, exact.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)
    assert pooled.count == 140


def test_a_mean_far_from_zero_is_closer_than_float32_holds_it() -> None:
    x = torch.randn(4, 3, 9) * 0.01 + 1000.3
    torch.testing.assert_close(moments_of(x).mean, x.double().mean((0, 2)), rtol=0, atol=1e-8)


def test_lockstep_waits_for_all_that_will_come_and_for_no_other() -> None:
    log: list[Any] = []
    places = [["a", "b"], ["a"], ["b", "a"]]

    def job(i: int) -> Any:
        def body() -> None:
            for place in places[i]:
                log.append((i, place))
                lockstep.arrive(place)

        return body

    from contextlib import nullcontext

    lockstep = Lockstep([job(i) for i in range(3)], [set(p) for p in places], log.append, nullcontext)
    lockstep.run()
    assert [entry for entry in log if isinstance(entry, tuple)].__len__() == 5
    assert set(log) >= {"a", "b"}


def test_of_any_norm_fused_with_an_activation_the_norm_alone_is_matched() -> None:
    timm = pytest.importorskip("timm.layers")
    original = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), timm.LayerNormAct2d(4)))
    converted = normswap.convert(original, to="gn", groups=2, sources=["ln-channel"])
    x = torch.randn(32, 3, 6, 6)
    calibrate(converted, original, x, method="moments")
    norm = original[1]
    wanted = F.layer_norm(original[0](x).movedim(1, -1), (4,), norm.weight, norm.bias, norm.eps).movedim(-1, 1)
    given = converted[1].norm(converted[0](x))
    torch.testing.assert_close(given.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given.var((0, 2, 3)), wanted.var((0, 2, 3)), rtol=1e-3, atol=1e-4)
