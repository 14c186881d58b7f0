"""BatchRenorm, against Ioffe 2017 in NumPy and, with its clips shut, torch's BatchNorm."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import randomized, relative
from torch import nn

from normswap.errors import OptionError
from normswap.norms.renorm import BatchRenorm, RenormOptions


def warmed(channels: int = 5, **kwargs: object) -> BatchRenorm:
    """In training, past its warm-up."""
    norm = randomized(BatchRenorm(channels, **{"warmup_steps": 100, **kwargs}))
    norm.renorm_steps.fill_(100)
    return norm.train()


def by_hand(x: np.ndarray, norm: BatchRenorm, r_max: float, d_max: float) -> np.ndarray:
    """Algorithm 1 of the paper, on (N, C, L)."""
    running_mean, running_var = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
    gamma, beta = norm.weight.detach().double().numpy(), norm.bias.detach().double().numpy()
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        mean, std = values.mean(), np.sqrt(values.var() + norm.eps)
        sigma = np.sqrt(running_var[c] + norm.eps)
        r = min(max(std / sigma, 1 / r_max), r_max)
        d = min(max((mean - running_mean[c]) / sigma, -d_max), d_max)
        y[:, c] = gamma[c] * ((values - mean) / std * r + d) + beta[c]
    return y


@pytest.mark.parametrize(("r_max", "d_max"), [(3.0, 5.0), (1.2, 0.1), (1.0, 0.0), (1e9, 1e9)])
def test_training_computes_the_papers_formula(r_max: float, d_max: float) -> None:
    norm = warmed(r_max=r_max, d_max=d_max)
    x = torch.randn(4, 5, 7) * 2 + 1
    expected = by_hand(x.double().numpy(), norm, r_max, d_max)
    assert relative(torch.from_numpy(expected), norm(x)) < 1e-5


def test_unclipped_training_computes_what_evaluation_computes() -> None:
    norm = warmed(r_max=1e9, d_max=1e9)
    x = torch.randn(4, 5, 7)
    y = norm(x)
    twin = copy.deepcopy(norm)
    fresh = warmed(r_max=1e9, d_max=1e9).eval()
    assert relative(fresh(x), y) < 1e-5
    assert not torch.equal(twin.running_mean, fresh.running_mean)  # training did move them


def test_evaluation_is_batch_norms() -> None:
    norm = warmed().eval()
    bn = nn.BatchNorm1d(5)
    bn.load_state_dict(norm.state_dict(), strict=False)
    x = torch.randn(4, 5, 7)
    assert torch.equal(norm(x), bn.eval()(x))


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 7), (2, 5, 3, 4), (2, 5, 2, 3, 2)])
def test_with_shut_clips_training_is_batch_norms_gradients_and_statistics_included(
    shape: tuple[int, ...], dtype: torch.dtype, momentum: float | None
) -> None:
    norm = warmed(r_max=1.0, d_max=0.0, momentum=momentum).to(dtype)
    bn = (None, None, nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape)](5, momentum=momentum)
    bn = bn.to(dtype)
    bn.load_state_dict(norm.state_dict(), strict=False)
    for _ in range(3):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        upstream = torch.randn(shape, dtype=dtype)
        y, z = norm(x), bn(twin)
        (y * upstream).sum().backward()
        (z * upstream).sum().backward()
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.weight.grad, bn.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.bias.grad, bn.bias.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_mean, bn.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, bn.running_var, rtol=1e-5, atol=1e-6)
    assert int(norm.num_batches_tracked) == int(bn.num_batches_tracked)


def test_the_gradient_is_that_of_the_formula_with_r_and_d_held_fixed() -> None:
    norm = warmed().double()
    x = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    mean, std = x.detach().mean((0, 2)), (x.detach().var((0, 2), correction=0) + norm.eps).sqrt()
    sigma = (norm.running_var + norm.eps).sqrt()
    r = (std / sigma).clamp(1 / 3, 3).view(1, 5, 1)
    d = ((mean - norm.running_mean) / sigma).clamp(-5, 5).view(1, 5, 1)

    def formula(x: torch.Tensor) -> torch.Tensor:
        standard = (x - x.mean((0, 2), keepdim=True)) / (x.var((0, 2), keepdim=True, correction=0) + norm.eps).sqrt()
        return (standard * r + d) * norm.weight.view(1, 5, 1) + norm.bias.view(1, 5, 1)

    assert torch.autograd.gradcheck(formula, (x,))
    upstream = torch.randn(4, 5, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad((formula(x) * upstream).sum(), x)
    (actual,) = torch.autograd.grad((norm(x) * upstream).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("steps", "r_max", "d_max"), [(0, 1.0, 0.0), (50, 2.0, 2.5), (100, 3.0, 5.0), (999, 3.0, 5.0)])
def test_the_clips_open_linearly_over_the_warm_up(steps: int, r_max: float, d_max: float) -> None:
    norm = warmed()
    norm.renorm_steps.fill_(steps)
    assert [float(c) for c in norm.clips()] == [r_max, d_max]
    x = torch.randn(4, 5, 7) * 2 + 1
    expected = by_hand(x.double().numpy(), norm, r_max, d_max)
    assert relative(torch.from_numpy(expected), norm(x)) < 1e-5
    assert int(norm.renorm_steps) == steps + 1


def test_without_a_warm_up_the_clips_are_open_at_once() -> None:
    assert [float(c) for c in BatchRenorm(3, warmup_steps=0).clips()] == [3.0, 5.0]


def test_evaluation_does_not_count_as_a_step_and_moves_nothing() -> None:
    norm = warmed().eval()
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    norm(torch.randn(4, 5, 7))
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())


def test_without_running_statistics_it_normalizes_each_batch() -> None:
    x = torch.randn(4, 5, 7)
    norm, bn = BatchRenorm(5, track_running_stats=False), nn.BatchNorm1d(5, track_running_stats=False)
    for training in (True, False):
        torch.testing.assert_close(norm.train(training)(x), bn.train(training)(x))


@pytest.mark.parametrize("missing", [["bias"], ["weight", "bias"]])
def test_without_beta_or_gamma_it_trains(missing: list[str]) -> None:
    norm, full = warmed(), warmed()
    for name in missing:
        full.get_parameter(name).data.fill_(1.0 if name == "weight" else 0.0)
        norm.register_parameter(name, None)
    x = torch.randn(4, 5, 7)
    torch.testing.assert_close(norm(x), full(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_trains_with_statistics_taken_in_float32(dtype: torch.dtype) -> None:
    norm = warmed()
    x = torch.randn(4, 5, 7) * 3 + 20  # squares of such values do not fit float16's precision
    expected = by_hand(x.to(dtype).double().numpy(), norm, 3.0, 5.0)
    twin = copy.deepcopy(norm).to(dtype)
    y = norm(x.to(dtype))
    assert y.dtype is dtype
    assert relative(torch.from_numpy(expected), y) < 1e-2
    assert twin(x.to(dtype)).isfinite().all()


def test_a_single_value_per_channel_is_refused_in_training() -> None:
    with pytest.raises(ValueError, match=r"more than one value per channel in training, got input \(1, 5\)"):
        warmed()(torch.randn(1, 5))


@pytest.mark.parametrize("bad", [{"r_max": 0.5}, {"d_max": -1.0}, {"warmup_steps": -1}, {"eps": -1.0}])
def test_impossible_options_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        RenormOptions(**bad)
