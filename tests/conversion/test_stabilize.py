"""Weights at their old size, and what that leaves as it is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import normswap
from normswap.conversion.stabilize import centralize, factors_of, folded_weights, rescale
from normswap.demo.digits import split
from normswap.demo.network import pretrained
from normswap.errors import OptionError, RevertError


@pytest.fixture(scope="module")
def x() -> Tensor:
    return split()[0].images[:16]


@pytest.mark.parametrize(("to", "options"), [("gn", {"groups": 4}), ("ln", {}), ("in", {}), ("ln-channel", {})])
def test_outputs_and_the_way_back_are_exact(to: str, options: dict, x: Tensor) -> None:
    model = normswap.convert(pretrained(), to, **options)
    before, eps = {k: v.clone() for k, v in model.state_dict().items()}, [_eps(m) for m in model.modules()]
    with torch.no_grad():
        expected = model(x)
        factors = factors_of(model)
        assert factors
        rescale(model, factors)
        assert not torch.equal(model.conv.weight, before["conv.weight"])
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
        rescale(model, factors, back=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert eps == [_eps(m) for m in model.modules()]
    normswap.revert(model)  # still exact
    original = pretrained()
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in model.state_dict().items())


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "eps", None)


def test_weights_come_within_a_factor_of_their_old_norm(x: Tensor) -> None:
    original = pretrained()
    model = normswap.convert(original, "gn", groups=4)
    normswap.calibrate(model, original, x, method="balance")
    shrunk = [_ratio(model, original, name) for name in _convolutions(original)]
    assert max(abs(math.log2(r)) for r in shrunk) > 0.6
    rescale(model, factors_of(model))
    ratios = [_ratio(model, original, name) for name in _convolutions(original)]
    assert max(abs(math.log2(r)) for r in ratios) < 0.51


def _convolutions(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def _ratio(model: nn.Module, original: nn.Module, name: str) -> float:
    new, old = (network.get_submodule(name).weight.detach().norm() for network in (model, original))
    return float(new / old)


def test_batch_norms_and_networks_without_undo_are_left_alone() -> None:
    for model in (
        pretrained(),
        normswap.convert(pretrained(), "frozen"),
        normswap.convert(pretrained(), "renorm"),
        normswap.convert(pretrained(), "gn", groups=4, undo=False),
    ):
        assert factors_of(model) == {}


def test_centralized_gradients_have_no_mean() -> None:
    weight = torch.zeros(5, 3, 3, 3)
    weight.grad = torch.randn(5, 3, 3, 3)
    expected = torch.stack([channel - channel.sum() / channel.numel() for channel in weight.grad])
    centralize(weight)
    torch.testing.assert_close(weight.grad, expected)


def test_within_the_block_a_loop_of_ones_own_trains_stabilized(x: Tensor) -> None:
    model = normswap.convert(pretrained(), "gn", groups=4)
    before = model.conv.weight.detach().clone()
    factor = factors_of(model)["bn"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with normswap.stabilized(model):
        assert torch.equal(model.conv.weight, before * factor)
        model(x).square().mean().backward()
        gradient = model.conv.weight.grad
        assert float(gradient.mean((1, 2, 3)).abs().max()) < 1e-6 * float(gradient.abs().max())
        optimizer.step()
    expected = before - 1e-3 * gradient / factor
    torch.testing.assert_close(model.conv.weight.detach(), expected)
    assert model.bn.eps == 1e-5
    model.zero_grad()
    model(x).square().mean().backward()  # outside of it gradients are as they come
    assert float(model.conv.weight.grad.mean((1, 2, 3)).abs().max()) > 1e-3 * float(model.conv.weight.grad.abs().max())


def test_a_file_saved_within_the_block_is_the_network_outside(x: Tensor, tmp_path: Path) -> None:
    model = normswap.convert(pretrained(), "gn", groups=4)
    with normswap.stabilized(model), torch.no_grad():
        expected = model(x)
        normswap.save(model, tmp_path / "within.safetensors")
        with pytest.raises(RevertError, match="stabilized"):
            normswap.revert(model)
    normswap.save(model, tmp_path / "after.safetensors")
    within, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("within", "after"))
    assert within.keys() == after.keys()
    assert all(torch.equal(within[name], after[name]) for name in within)
    with torch.no_grad():
        torch.testing.assert_close(normswap.load(tmp_path / "within.safetensors", model=pretrained())(x), expected)


def test_an_error_within_the_block_leaves_the_network_as_it_was() -> None:
    model = normswap.convert(pretrained(), "gn", groups=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyError), normswap.stabilized(model):
        raise KeyError
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_folded_weights_are_those_of_the_convolutions() -> None:
    model = normswap.convert(pretrained(), "gn", groups=4)
    assert set(folded_weights(model)) == {m.weight for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert folded_weights(normswap.convert(pretrained(), "frozen")) == []


def test_a_wrapper_is_stabilized_by_what_it_holds() -> None:
    model = normswap.convert(pretrained(), "gn", groups=4)
    for wrapper in (nn.DataParallel(model), nn.Sequential(model), torch.compile(model, backend="eager")):
        with normswap.stabilized(wrapper):
            assert model.bn.eps != 1e-5
        assert model.bn.eps == 1e-5


def test_blocks_can_be_nested() -> None:
    model = normswap.convert(pretrained(), "gn", groups=4)
    with normswap.stabilized(model):
        outer = model.bn.eps
        with normswap.stabilized(model):
            assert model.bn.eps == outer
        assert model.bn.eps == outer
        with pytest.raises(OptionError, match="stabilized"):
            normswap.convert(model, "ln")
    assert model.bn.eps == 1e-5
