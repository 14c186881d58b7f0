"""From norms without running statistics to fixed maps: `gn`, `in`, `ln-channel` -> `bn`, `frozen`, `fused`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents, randomized, relative, run
from torch import Tensor, nn

import normswap
from normswap.conversion.record import record_of
from normswap.errors import PlanError
from normswap.planning.plan import Transfer

FIXED = ["bn", "sync", "renorm", "frozen", "fused"]


def network(norm: Any, *, kernel: int = 1, bias: bool = True) -> nn.Module:
    """Three convolutions with a norm behind each, some gammas negative."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate([(3, 8), (8, 8), (8, 8)]):
        layers += [nn.Conv2d(inputs, outputs, kernel, bias=bias), norm(outputs), nn.Tanh() if i else nn.ReLU()]
    made = randomized(nn.Sequential(*layers))
    for parameter in (made[1].weight, made[4].weight):
        parameter.data[::3] *= -1
    return made


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def shuffled(count: int = 6) -> Tensor:
    """Images of the same pixels in other places: to 1x1 convolutions all have the same statistics."""
    random = torch.Generator().manual_seed(1)
    one = torch.randn(3, 36, generator=random)
    return torch.stack([one[:, torch.randperm(36, generator=random)].view(3, 6, 6) for _ in range(count)])


def later(net: nn.Module, to: str, **options: Any) -> nn.Module:
    return normswap.convert(net, to, missing_statistics="later", **options)


NORMS = {"gn": group_norm, "in": lambda c: nn.InstanceNorm2d(c, affine=True), "ln": lambda c: nn.GroupNorm(1, c)}


@pytest.mark.parametrize("to", FIXED)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["moments", "refit"])
def test_where_all_images_have_the_same_statistics_nothing_changes(to: str, norm: str, method: Any) -> None:
    net, data = network(NORMS[norm]), shuffled()
    made = later(net, to)
    normswap.calibrate(made, net, data, method=method)
    assert relative(run(net, data), run(made, data)) < 1e-4


@pytest.mark.parametrize("to", FIXED)
@pytest.mark.parametrize("bias", [True, False])
def test_every_layer_gives_the_moments_of_the_original(to: str, bias: bool) -> None:
    net, data = network(group_norm, kernel=3, bias=bias), torch.randn(16, 3, 12, 12)
    made = later(net, to)
    normswap.calibrate(made, net, data, method="moments")
    for end in (2, 5, 8):
        before, after = (model[:end].eval()(data).detach().transpose(0, 1).flatten(1) for model in (net, made))
        torch.testing.assert_close(after.mean(1), before.mean(1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after.var(1), before.var(1), atol=1e-4, rtol=1e-3)
        both = [values - values.mean(1, keepdim=True) for values in (before, after)]
        assert bool(((both[0] * both[1]).mean(1) > 0).all())  # no channel is upside down


@pytest.mark.parametrize("to", ["bn", "frozen", "fused"])
def test_fitting_the_layers_anew_comes_closer(to: str) -> None:
    net = network(group_norm, kernel=3)
    size = torch.linspace(0.3, 3, 48)[:, None, None, None]  # dim and bright images, which GroupNorm makes alike
    data = torch.randn(48, 3, 12, 12) * size
    drifts = []
    for method in ("moments", "refit"):
        made = later(net, to)
        drifts.append(normswap.calibrate(made, net, data, method=method).drift_after)
    assert drifts[1] < 0.95 * drifts[0]


def test_fitting_one_layer_is_ridge_regression_towards_its_scaled_weights() -> None:
    net = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)))
    x = torch.randn(40, 3) * torch.linspace(0.3, 3, 40)[:, None]
    pixels = x[..., None, None]
    made = later(net, "fused")
    normswap.calibrate(made, net, pixels, method="refit")
    wanted, sign = net(pixels).detach().double().flatten(1), net[1].weight.detach().sign().double()
    weight, bias = net[0].weight.detach().double().flatten(1), net[0].bias.detach().double()
    now = torch.cat([weight, bias[:, None]], 1) * sign[:, None]
    rows = torch.cat([x.double(), torch.ones(40, 1, dtype=torch.float64)], 1)
    given = rows @ now.T
    centred = given - given.mean(0)
    slope = (centred * (wanted - wanted.mean(0))).sum(0) / centred.square().sum(0)
    now = now * slope[:, None]
    now[:, 3] += wanted.mean(0) - slope * given.mean(0)
    gram = rows.T @ rows
    power = gram.diagonal().mean()
    held = torch.diag(torch.cat([0.1 * power.expand(3), 1e-6 * power[None]]))
    new = now + torch.linalg.solve(gram + held, (wanted - rows @ now.T).T @ rows, left=False)
    fitted = rows @ new.T
    k = (wanted.var(0) / fitted.var(0)).sqrt()  # then the moments are matched
    new, shift = new * k[:, None], wanted.mean(0) - k * fitted.mean(0)
    torch.testing.assert_close(made[0].weight.double().flatten(1), new[:, :3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made[0].bias.double(), new[:, 3] + shift, rtol=1e-3, atol=1e-4)


def test_a_channel_that_gamma_silences_stays_silent() -> None:
    net, data = network(group_norm), torch.randn(8, 3, 6, 6)
    net[1].weight.data[2] = 0
    made = later(net, "fused")
    normswap.calibrate(made, net, data, method="moments")
    torch.testing.assert_close(made[:2](data)[:, 2], net[:2](data)[:, 2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("to", ["bn", "frozen", "fused"])
@pytest.mark.parametrize("method", ["moments", "refit"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_file_loads_the_same_and_the_original_comes_back_to_the_bit(
    tmp_path: Path, to: str, method: Any, bias: bool
) -> None:
    net, data = network(group_norm, kernel=3, bias=bias), torch.randn(8, 3, 12, 12)
    made = later(net, to)
    normswap.calibrate(made, net, data, method=method)
    normswap.calibrate(made, net, data[:4], method=method)  # again, on other images
    normswap.save(made, tmp_path / "made.safetensors")
    loaded = normswap.load(tmp_path / "made.safetensors", model=network(group_norm, kernel=3, bias=bias))
    assert torch.equal(run(loaded, data), run(made, data))
    assert contents(normswap.revert(loaded)) == contents(net)
    assert contents(normswap.revert(made)) == contents(net)


def test_one_that_was_trained_since_does_not_pass_for_the_original() -> None:
    net, data = network(group_norm), torch.randn(8, 3, 6, 6)
    made = later(net, "fused")
    normswap.calibrate(made, net, data)
    made[3].weight.data[0, 0] += 1
    with pytest.raises(normswap.RevertError, match="the first is 3"):
        normswap.revert(made)


def test_fused_leaves_no_norm_and_frozen_trains_nothing_of_it() -> None:
    net, data = network(group_norm), torch.randn(8, 3, 6, 6)
    fused, frozen = later(net, "fused"), later(net, "frozen")
    for made in (fused, frozen):
        normswap.calibrate(made, net, data)
    assert [type(fused[i]) for i in (1, 4, 7)] == [nn.Identity] * 3
    assert not [name for name, _ in frozen[1].named_parameters()]
    assert float(frozen[1].running_mean.abs().max()) > 0.01


def test_where_no_layer_feeds_the_norm_a_scale_and_a_shift_remain() -> None:
    net, data = randomized(nn.Sequential(nn.GroupNorm(1, 3), nn.Conv2d(3, 4, 1))), shuffled()
    made = later(net, "fused")
    (step,) = normswap.plan(net, "fused", missing_statistics="later").steps
    assert step.transfer is Transfer.ESTIMATE
    normswap.calibrate(made, net, data)
    assert relative(run(net, data), run(made, data)) < 1e-5
    assert sorted(dict(made[0].named_parameters())) == ["scale", "shift"]


def test_tiles_equal_the_whole_image_away_from_borders() -> None:
    net, data = network(group_norm, kernel=3), torch.randn(8, 3, 24, 24) * torch.rand(8, 1, 24, 24)
    made = later(net, "fused")
    normswap.calibrate(made, net, data)
    image = torch.randn(1, 3, 48, 48) * torch.linspace(0, 3, 48)
    for model, near in ((net, False), (made, True)):
        whole, tile = model(image), model(image[..., 16:40])
        assert (relative(whole[..., 16:34], tile) < 1e-5) == near


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(self.stem(x))))
        return self.norm(self.conv(x))


@pytest.mark.parametrize("to", ["bn", "frozen", "fused"])
def test_a_norm_that_runs_twice_is_estimated_over_both(to: str) -> None:
    net, data = randomized(Twice()), torch.randn(8, 3, 6, 6)
    made = later(net, to, example_inputs=data[:2])
    report = normswap.calibrate(made, net, data, method="moments")
    assert report.layers[0].calls == 2
    assert report.error_after < 1e-3


def test_beside_folded_norms_the_self_check_still_proves_the_rest() -> None:
    net = randomized(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    )
    net[1].weight.data[:3] *= -1
    rules = {"1": "fused", "4": "gn"}
    made = normswap.convert(
        net, rules=rules, groups=2, sources=["gn", "bn"], missing_statistics="later", example_inputs=shuffled(2)
    )
    check = record_of(made).check
    assert check.passed
    assert check.error is not None
    normswap.calibrate(made, net, shuffled(), method="moments", eps=0)
    assert relative(run(net[:2], shuffled()), run(made[:2], shuffled())) < 1e-4


def test_without_calibrating_later_it_is_refused_with_the_way() -> None:
    with pytest.raises(PlanError) as caught:
        normswap.convert(network(group_norm), "fused")
    assert "missing_statistics='later'" in str(caught.value)
