"""`calibrate` with balancing and refitting: signs, sizes, eps, and layers that are fitted anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from calibrated import Net, assert_same_moments, images, run_at, trained
from helpers import broadcast, contents, randomized, run
from torch import Tensor, nn
from torchvision.models import resnet18

import normswap
from normswap.calibration.balance import rescale, signs, sizes
from normswap.calibration.calibrate import calibrate
from normswap.calibration.norm_targets import targets_of
from normswap.calibration.refit import fitted
from normswap.conversion.record import record_of
from normswap.detection import detector
from normswap.errors import RevertError


def test_balancing_leaves_what_a_norm_with_fixed_statistics_would_compute(net: nn.Module) -> None:
    model = normswap.convert(net, to="gn", groups=2)
    target = next(t for t in targets_of(model, net) if t.path == "stem.1")
    x = images()

    def fixed() -> Tensor:
        return run_at(model.stem[0], x) * broadcast(model.stem[1].weight.detach(), x)

    before, factor = fixed(), torch.tensor([-2.0, 0.7, 1.3, -0.5], dtype=torch.float64)
    record = record_of(model)
    rescale(model, target, record.plan.steps[0], factor, record.undo)
    torch.testing.assert_close(fixed(), before)


def test_balancing_a_prescaled_norm_scales_and_shifts_what_enters_it_alike() -> None:
    net = randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))
    model = normswap.convert(net, to="gn", groups=2)
    (target,), record = targets_of(model, net), record_of(model)
    assert record.plan.steps[0].transfer == "prescale"
    x, factor = torch.randn(2, 4, 5, 5), torch.tensor([-2.0, 0.7, 1.3, -0.5])
    mean, scale = (broadcast(t, x) for t in (net[1].running_mean, (net[1].running_var + net[1].eps).rsqrt()))
    rescale(model, target, record.plan.steps[0], factor.double(), record.undo)
    torch.testing.assert_close(run_at(model[1].standardize, x), (x - mean) * scale * broadcast(factor, x))
    torch.testing.assert_close(model[1].norm.weight, net[1].weight / factor)


def test_signs_come_close_to_the_best_of_all() -> None:
    means = torch.randn(30, 2 * 6, dtype=torch.float64) + 2 * torch.randn(30, 1, dtype=torch.float64)
    means = means - means.mean(0)
    found = (means * signs(means, 2)).view(30, 2, 6).sum(2).square().sum(0)
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    best = torch.stack([(means[:, g * 6 : g * 6 + 6] @ every.T).square().sum(0).min() for g in (0, 1)])
    assert (found <= 2 * best).all()
    assert (found < 0.3 * means.view(30, 2, 6).sum(2).square().sum(0)).all()


def test_sizes_bring_a_group_norm_closer_to_batch_norm() -> None:
    x = torch.randn(64, 8, 5, 5, dtype=torch.float64)
    x[:, 1] *= torch.rand(64, 1, 1, dtype=torch.float64) * 3  # its power differs from sample to sample
    x[:, 6] += 2 * torch.randn(64, 1, 1, dtype=torch.float64)  # its mean does
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)

    def error(t: Tensor) -> float:
        y = nn.functional.group_norm(x * broadcast(t, x), 2, eps=1e-5)
        k = x.std((0, 2, 3), keepdim=True) / y.std((0, 2, 3), keepdim=True)
        return float((k * (y - y.mean((0, 2, 3), keepdim=True)) - x).square().mean())

    means, squares = x.mean((2, 3)), x.square().mean((2, 3))
    t = sizes(means, squares, torch.ones(8), 2, 1e-5)
    assert error(t) < 0.7 * error(torch.ones(8, dtype=torch.float64))
    assert t[1] < 1
    assert t[6] < 1
    assert (t >= 0.5).all()
    assert (t <= 2).all()


def test_eps_is_raised_only_where_the_conversion_was_given_none(net: nn.Module) -> None:
    for given, asked, expected in ((None, None, 4.0), (0.1, None, 0.1), (0.1, 2.0, 2.0), (None, 0, 1e-5)):
        model = normswap.convert(net, to="gn", groups=2, eps=given)
        calibrate(model, net, images(), eps=asked)
        assert model.stem[1].eps == expected
        assert_same_moments(model, net, [images()])
    copied = normswap.convert(net, to="gn", groups=2, transfer="copy")
    calibrate(copied, net, images())
    assert copied.stem[1].eps == 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_a_balanced_network_is_saved_loaded_and_reverted(net: nn.Module, tmp_path: Any, bias: bool) -> None:
    if not bias:
        net.stem[0].register_parameter("bias", None)
    before = contents(net)
    model = normswap.convert(net, to="gn", groups=1)
    calibrate(model, net, images(), method="balance")
    assert (model.stem[1].weight < 0).any()  # some channel was negated
    normswap.save(model, tmp_path / "model.safetensors")
    loaded = normswap.load(tmp_path / "model.safetensors", model=Net())
    assert loaded.stem[1].eps == 4.0
    assert torch.equal(run(loaded, images()), run(model, images()))
    for each in (model, loaded):
        normswap.revert(each)
        assert contents(each) == before


def ridge(rows: np.ndarray, aim: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Weights (and a free bias, the last) that minimise `|aim - w rows|^2 + ridge |w - now|^2`, by stacked rows."""
    power = (rows**2).sum(1).mean()
    held = np.sqrt(np.diag([0.1 * power] * (len(rows) - 1) + [1e-6 * power]))
    return (
        now
        + np.linalg.lstsq(np.hstack([rows, held]).T, np.hstack([aim - now @ rows, 0 * now @ held]).T, rcond=None)[0].T
    )


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 7, 6)),
        (nn.Conv2d(4, 6, (1, 3), padding=(0, 2), dilation=2, groups=2), (3, 4, 5, 6)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (3, 4, 5, 5)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
        (nn.Conv2d(4, 6, 1), (3, 4, 5, 5)),
        (nn.Linear(4, 6), (30, 4)),
    ],
)
def test_a_refitted_layer_is_a_ridge_regression(layer: Any, shape: tuple[int, ...]) -> None:
    randomized(layer)
    x = torch.randn(shape)
    with torch.no_grad():
        z = layer(x) + torch.randn(layer(x).shape)
        scale, shift = torch.rand(z.shape[1]) + 0.5, torch.randn(z.shape[1])
        weight, bias = fitted(layer, [(x[:1], z[:1]), (x[1:], z[1:])], scale, shift)
        # Each weight's input at every position is what the layer gives when that weight alone is 1.
        groups, outs = getattr(layer, "groups", 1), z.shape[1]
        probe = type(layer).__new__(type(layer))
        probe.__dict__.update(layer.__dict__, _parameters=dict(layer._parameters))
        probe._parameters["bias"] = nn.Parameter(torch.zeros(outs))
        size = layer.weight[0].numel()
        for group in range(groups):
            channels = slice(group * outs // groups, (group + 1) * outs // groups)
            rows = []
            for i in range(size):
                only = torch.zeros_like(layer.weight)
                only.view(outs, -1)[channels.start, i] = 1
                probe._parameters["weight"] = nn.Parameter(only)
                rows.append(probe(x)[:, channels.start].flatten())
            table = torch.stack([*rows, torch.ones_like(rows[0])]).double().numpy()
            aim = (z * broadcast(scale, z) + broadcast(shift, z))[:, channels].movedim(1, 0).flatten(1).double().numpy()
            now = torch.cat([layer.weight.view(outs, -1), layer.bias[:, None]], 1)[channels].double().numpy()
            found = torch.cat([weight.view(outs, -1), bias[:, None]], 1)[channels].double().numpy()
            np.testing.assert_allclose(found, ridge(table, aim, now), rtol=1e-3, atol=1e-4)


def test_a_layer_is_refitted_on_positions_from_all_over_the_image() -> None:
    layer = nn.Conv2d(1, 1, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    x = torch.randn(4, 1, 20, 20).sign()
    z = 2 * x
    z[:, :, :10] = 0  # nothing above, twice the input below: the input itself on the whole, less what the ridge holds
    weight, _ = fitted(layer, [(x, z)], torch.ones(1), torch.zeros(1))
    assert float(weight) == pytest.approx(1 / 1.1, abs=0.1)


def test_refitting_brings_what_enters_the_norms_closer_to_the_original_and_keeps_the_moments(net: nn.Module) -> None:
    data, unexplained = images(60), {}
    wanted = run_at(net.body[1].conv1, run_at(net.body[0], run_at(net.stem, data))).movedim(1, 0).flatten(1)
    for method in ("balance", "refit"):
        model = normswap.convert(net, to="gn", groups=2)
        calibrate(model, net, data.split(17), method=method)
        assert_same_moments(model, net, [data])
        order = {order.path: order.rows for order in record_of(model).undo.orders}["body.1.conv1"]
        found = run_at(model.body[1].conv1, run_at(model.body[0], run_at(model.stem, data))).movedim(1, 0).flatten(1)
        pairs = zip(wanted[order], found, strict=True)
        unexplained[method] = np.mean([1 - np.corrcoef(a, b)[0, 1] ** 2 for a, b in pairs])
    assert unexplained["refit"] < unexplained["balance"]


def test_a_refitted_network_is_saved_loaded_and_reverted_unless_it_was_trained(net: nn.Module, tmp_path: Any) -> None:
    before = contents(net)
    model = normswap.convert(net, to="gn", groups=2)
    calibrate(model, net, images(), method="refit")
    calibrate(model, data=images(), method="refit")
    normswap.save(model, tmp_path / "model.safetensors")
    loaded, moved = (normswap.load(tmp_path / "model.safetensors", model=Net()) for _ in range(2))
    for each in (model, loaded):
        normswap.revert(each)
        assert contents(each) == before
    moved.stem[0].weight.data[0, 0, 0, 0] += 1
    with pytest.raises(RevertError, match=r"stem\.0"):
        normswap.revert(moved)


def test_layers_that_cannot_be_refitted_are_left(net: nn.Module) -> None:
    net.stem[0] = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    net = trained(randomized(net), images(40))
    balanced, refitted = (normswap.convert(net, to="gn", groups=2) for _ in range(2))
    calibrate(balanced, net, images(), method="balance")
    calibrate(refitted, net, images())
    assert torch.equal(balanced.stem[0].weight, refitted.stem[0].weight)
    assert not torch.equal(balanced.body[0].conv1.weight, refitted.body[0].conv1.weight)
    assert_same_moments(refitted, net, [images()])


def test_prescaled_channels_are_balanced_in_front_of_the_norm() -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + torch.relu(self.norm(y))

    net = trained(randomized(PreActivation()), images(40))
    model = normswap.convert(net, to="gn", groups=1)
    scale = model.norm.standardize.scale.clone()
    report = calibrate(model, net, images())
    assert not torch.equal(model.norm.standardize.scale, scale)
    assert report.error_after < 1e-5
    assert_same_moments(model, net, [images()])


def test_layers_on_regions_that_a_detector_proposes_are_not_fitted_anew() -> None:
    """Each network proposes regions of its own, so what these layers see cannot be compared one by one."""
    few = {"rpn_post_nms_top_n_test": 10, "rpn_pre_nms_top_n_test": 20, "min_size": 64, "max_size": 64}
    torch.manual_seed(0)
    original = detector("fasterrcnn", backbone=resnet18(), num_classes=3, norm="bn", width=32, **few).eval()
    model = normswap.convert(original, rules={"backbone.body.*": "frozen", "*": "gn"}, groups=4)
    calibrate(model, original, [[torch.rand(3, 64, 64), torch.rand(3, 48, 64)]], method="refit")
    anew = [layer.path for layer in record_of(model).undo.layers if layer.given is not None]
    assert any(path.startswith("backbone.fpn") for path in anew)
    assert not any(path.startswith("roi_heads") for path in anew)
