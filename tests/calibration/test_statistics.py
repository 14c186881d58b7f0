"""Running statistics that were never updated are told from those of a new network, and estimated from images."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import Residual, contents, conv_bn, randomized, relative, run
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.conversion.preconditions import affine_moved, never_updated
from normswap.errors import OptionError
from normswap.norms.registry import states_in

X = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 3 + 1


def neglected(net: nn.Module) -> nn.Module:
    """Trained, but for its running statistics."""
    for module in randomized(net).modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    return net


def test_statistics_of_a_trained_network_that_are_those_of_a_new_one_are_seen() -> None:
    net = neglected(Residual())
    assert never_updated(states_in(net)) == 2
    assert affine_moved(states_in(net))
    net.bn1.running_mean[0] = 0.1
    assert never_updated(states_in(net)) == 0
    assert never_updated(states_in(randomized(Residual()))) == 0
    assert never_updated(states_in(nn.Sequential(nn.GroupNorm(2, 4)))) == 0
    new = Residual()
    assert (never_updated(states_in(new)), affine_moved(states_in(new))) == (2, False)
    nn.init.zeros_(new.bn2.weight)  # as zero_init_residual does
    assert not affine_moved(states_in(new))


def test_one_batch_in_training_mode_updates_them() -> None:
    net = neglected(Residual()).train()
    for norm in (net.bn1, net.bn2):
        norm.momentum = 0.0
    net(X)
    assert never_updated(states_in(net)) == 0


def test_converting_such_a_network_warns_and_names_what_estimates_them() -> None:
    with pytest.warns(UserWarning, match=r"its 2 norms never updated.*normswap\.estimate_statistics\(model, images\)"):
        normswap.convert(neglected(Residual()), "gn", groups=2)


def test_a_new_network_and_what_carries_no_statistics_over_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normswap.convert(Residual(), "gn", groups=2)
        normswap.convert(randomized(Residual()), "gn", groups=2)
        normswap.convert(neglected(Residual()), "gn", groups=2, transfer="copy")
        normswap.convert(neglected(Residual()), "frozen")


@torch.no_grad()
def expected_statistics(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of each norm's input where each norm before it uses those of the whole data, in float64."""

    def normalized(x: Tensor, bn: nn.Module) -> Tensor:
        found.append((x.mean((0, 2, 3)), x.var((0, 2, 3))))
        return F.batch_norm(x, x.mean((0, 2, 3)), x.var((0, 2, 3)), bn.weight, bn.bias, False, 0.0, bn.eps)

    found: list[tuple[Tensor, Tensor]] = []
    net, x = copy.deepcopy(net).double(), X.double()
    y = torch.relu(normalized(net.conv1(x), net.bn1))
    normalized(net.conv2(y), net.bn2)
    return found


@pytest.mark.parametrize("batch_size", [12, 5])
@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel], ids=["bare", "wrapped"])
def test_estimated_statistics_are_those_of_all_the_data(batch_size: int, wrap: type[nn.Module]) -> None:
    net = neglected(Residual()).train()
    affine = {name: value for name, value in contents(net).items() if "running" not in name}
    report = normswap.estimate_statistics(wrap(net), X, batch_size=batch_size)
    assert (report.images, len(report.layers)) == (12, 2)
    for norm, (mean, var) in zip((net.bn1, net.bn2), expected_statistics(net), strict=True):
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-4, atol=1e-5)
    assert {name: value for name, value in contents(net).items() if "running" not in name} == affine
    assert net.training


def test_a_network_with_estimated_statistics_converts_closely_and_without_them_it_does_not() -> None:
    net = nn.Sequential(nn.Conv2d(4, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32))
    net = neglected(net)
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-2, 1, 32)[:, None, None, None])
    wanted = copy.deepcopy(net)
    normswap.estimate_statistics(wanted, X)
    apart = {}
    for name, original in (("estimated", wanted), ("never updated", net)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            apart[name] = relative(run(wanted, X), run(normswap.convert(original, "ln"), X))
    assert apart["estimated"] < 0.25 < 0.5 < apart["never updated"]


def test_frozen_statistics_and_networks_without_any_are_left() -> None:
    net = neglected(nn.Sequential(conv_bn(8), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)))
    normswap.freeze(net, modules="0")
    normswap.estimate_statistics(net, torch.randn(6, 3, 8, 8))
    assert not bool(net[0][1].running_mean.any())
    assert bool(net[2].running_mean.any())
    with pytest.raises(OptionError, match="no running statistics to estimate"):
        normswap.estimate_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), torch.randn(6, 3, 8, 8))
    with pytest.raises(OptionError, match="images are needed"):
        normswap.estimate_statistics(net)
    for words in ("photos", "synthetic"):
        with pytest.raises(OptionError, match=f'data="{words}" is made by the running statistics'):
            normswap.estimate_statistics(net, words)


def test_statistics_of_each_part_of_a_batch_are_all_estimated() -> None:
    class SplitBatchNorm(nn.BatchNorm2d):
        """As lightly's."""

        def forward(self, x: Tensor) -> Tensor:
            mean, var = self.running_mean[: self.num_features], self.running_var[: self.num_features]
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.1, self.eps)

    SplitBatchNorm.__module__, SplitBatchNorm.__qualname__ = "lightly.models.batchnorm", "SplitBatchNorm"
    norm = SplitBatchNorm(4)
    norm.num_splits, norm.running_mean, norm.running_var = 3, torch.zeros(12), torch.ones(12)
    normswap.estimate_statistics(nn.Sequential(norm).eval(), X)
    torch.testing.assert_close(norm.running_mean, X.mean((0, 2, 3)).repeat(3))
    torch.testing.assert_close(norm.running_var, X.movedim(1, 0).flatten(1).var(1).repeat(3))
