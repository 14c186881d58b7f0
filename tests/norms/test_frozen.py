"""FrozenBatchNorm, against its formula and torchvision's FrozenBatchNorm2d."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import bits, bn_eval, randomized, relative
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from normswap.norms.frozen import FrozenBatchNorm
from normswap.norms.registry import identify


def filled(channels: int = 6, eps: float = 1e-3) -> FrozenBatchNorm:
    return randomized(FrozenBatchNorm(channels, eps=eps))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (2, 6, 3, 4), (2, 6, 2, 3, 4)])
def test_it_computes_the_batch_norm_formula_in_any_dimension(shape: tuple[int, ...]) -> None:
    norm, x = filled(), torch.randn(shape)
    assert relative(bn_eval(norm, x), norm(x)) < 1e-6


def test_it_computes_the_same_in_training_mode() -> None:
    norm, x = filled(), torch.randn(2, 6, 3, 3)
    before = norm.eval()(x)
    assert torch.equal(before, norm.train()(x))


def test_nothing_in_it_trains_or_moves() -> None:
    norm = filled().train()
    before = [bits(b) for b in norm.buffers()]
    norm(torch.randn(2, 6, 3, 3)).sum()
    assert not list(norm.parameters())
    assert [bits(b) for b in norm.buffers()] == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    assert filled()(torch.randn(2, 6, 3, 3).to(dtype)).dtype is dtype


def test_with_eps_0_it_divides_by_the_plain_standard_deviation() -> None:
    norm, x = filled(eps=0.0), torch.randn(2, 6, 3, 3)
    assert relative(bn_eval(norm, x), norm(x)) < 1e-6


@pytest.mark.parametrize("grad", [True, False])
def test_half_precision_autocast_gives_finite_values_of_the_convolutions_dtype(grad: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), filled(eps=0.0), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype is torch.bfloat16
    assert relative(net(x), y) < 2e-2
    if grad:
        y.float().sum().backward()
        assert net[0].weight.grad.isfinite().all()


def test_float16_buffers_give_the_formula_to_half_precision() -> None:
    # Small variances: 1 / sqrt(var) computed in float16 would already be coarse, eps = 1e-5 would vanish.
    norm = filled(eps=1e-5)
    norm.running_var.mul_(1e-3)
    norm.refresh()
    x = torch.randn(2, 6, 3, 3) * 0.05
    expected = bn_eval(norm, x)
    y = norm.half()(x.half())
    assert y.isfinite().all()
    assert relative(expected, y) < 3e-3


def saved_for_backward(norm: nn.Module, x: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x)
    return kept


def test_no_tensor_of_the_inputs_size_is_kept_for_the_backward_pass() -> None:
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    assert all(t.untyped_storage().nbytes() <= 6 * 4 for t in saved_for_backward(filled(), x))
    bn = nn.BatchNorm2d(6).eval()  # the measure would notice: a BatchNorm keeps its input
    assert any(t.numel() == x.numel() for t in saved_for_backward(bn, x))


def test_the_gradient_is_the_channels_scale() -> None:
    norm = filled()
    x = torch.randn(2, 6, 3, 3, requires_grad=True)
    norm(x).sum().backward()
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert relative(scale.view(1, 6, 1, 1).expand_as(x), x.grad) < 1e-6


# --- the state dict ---------------------------------------------------------------------------------------------


def test_its_state_dict_has_torchvisions_keys_and_loads_both_ways() -> None:
    norm, peer = filled(), FrozenBatchNorm2d(6, eps=1e-3)
    assert set(norm.state_dict()) == set(peer.state_dict())
    peer.load_state_dict(norm.state_dict())
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(peer(x), norm(x), rtol=1e-5, atol=1e-6)
    other = FrozenBatchNorm(6, eps=1e-3)
    other.load_state_dict(peer.state_dict())
    torch.testing.assert_close(peer(x), other(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("assign", [False, True])
def test_a_batch_norms_state_dict_loads_and_takes_effect(assign: bool) -> None:
    bn = randomized(nn.BatchNorm2d(6, eps=1e-3))
    norm = FrozenBatchNorm(6, eps=1e-3)
    norm.load_state_dict(bn.state_dict(), strict=True, assign=assign)
    x = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(norm(x), bn(x), rtol=1e-5, atol=1e-6)


def test_loading_leaves_the_callers_dict_whole() -> None:
    values = randomized(nn.BatchNorm2d(6)).state_dict()
    FrozenBatchNorm(6).load_state_dict(values)
    assert "num_batches_tracked" in values


def test_a_missing_key_is_still_an_error() -> None:
    values = filled().state_dict()
    del values["running_var"]
    with pytest.raises(RuntimeError, match="running_var"):
        FrozenBatchNorm(6).load_state_dict(values)


# --- what networks go through -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to("meta").to_empty(device="cpu"),
        lambda m: m.double(),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
    ids=["meta", "double", "deepcopy", "pickle"],
)
def test_it_is_right_after(move: Callable[[nn.Module], nn.Module]) -> None:
    values = filled().state_dict()
    norm = move(filled())
    norm.load_state_dict(values)
    x = torch.randn(2, 6, 4, 4).to(norm.weight.dtype)
    assert relative(bn_eval(norm, x), norm(x)) < 1e-6


def test_torchvisions_and_torchs_layers_are_known_apart() -> None:
    assert identify(FrozenBatchNorm2d(4)).name == "frozen"
    assert identify(filled()).name == "frozen"
    assert identify(nn.BatchNorm2d(4).eval().requires_grad_(False)).name == "bn"
