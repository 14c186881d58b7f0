"""AdaIN: without a style InstanceNorm to the bit, with one the style's mean and deviation in each channel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import grouped, randomized, relative
from torch import Tensor, nn

import normswap
from normswap.errors import NetworkError
from normswap.norms.instance_adaptive import AdaptiveInstanceNorm

C = 8
EXPECTED = {"adain": lambda x, bn: grouped(x, C, 1e-5, bn.weight, bn.bias)}


def network(norm: type[nn.Module] = nn.InstanceNorm2d) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, C, 3), norm(C, affine=True), nn.ReLU(), nn.Conv2d(C, C, 3), norm(C, affine=True)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(C, 3, 3))
    for layer in model:
        if isinstance(layer, norm):
            nn.init.normal_(layer.weight, 1.0)
            nn.init.normal_(layer.bias)
    return model.eval()


def images(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 12, 10, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.3


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((2, 3)), x.var((2, 3), correction=0)


def test_instance_norm_goes_to_adain_and_back_to_the_bit(tmp_path: Path) -> None:
    model = network()
    new = normswap.convert(model, "adain", example_inputs=images())
    assert [str(step.transfer) for step in normswap.plan(model, "adain", example_inputs=images()).steps] == [
        "exact"
    ] * 2
    assert isinstance(new[1], AdaptiveInstanceNorm)
    assert torch.equal(new(images()), model(images()))
    loaded = normswap.load(normswap.save(new, tmp_path / "new.safetensors"), model=network())
    assert torch.equal(loaded(images()), model(images()))
    back = normswap.convert(new, "in", example_inputs=images())
    assert type(back[1]) is nn.InstanceNorm2d
    assert torch.equal(back(images()), model(images()))
    grouped_norm = normswap.convert(new, "gn", groups=C, example_inputs=images())
    assert relative(model(images()), grouped_norm(images())) < 1e-5


def test_batch_norm_folds_into_the_layer_before_it() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU()))
    new = normswap.convert(model, "adain", example_inputs=images())
    other = normswap.convert(model, "in", example_inputs=images())
    assert torch.equal(new(images()), other(images()))


@pytest.mark.parametrize("shape", [(3, C, 9), (3, C, 4, 5), (3, C, 2, 3, 4)])
def test_the_output_has_the_mean_and_deviation_of_the_style(shape: tuple[int, ...]) -> None:
    norm = AdaptiveInstanceNorm(C)
    x, style = torch.randn(shape), torch.randn(shape[0], C, *[7] * (len(shape) - 2)) * 3 + 2
    y = norm(x, style).flatten(2)
    torch.testing.assert_close(y.mean(2), style.flatten(2).mean(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y.std(2, correction=0), style.flatten(2).std(2, correction=0), rtol=1e-4, atol=1e-5)


def test_scale_and_shift_may_be_given_themselves() -> None:
    norm, x = AdaptiveInstanceNorm(C), images() @ torch.ones(10, 10)
    x = x.repeat(1, 3, 1, 1)[:, :C]
    scale, shift = torch.rand(3, C), torch.randn(3, C)
    expected = grouped(x, C, norm.eps) * scale[..., None, None] + shift[..., None, None]
    assert relative(expected, norm(x, (scale, shift))) < 1e-6
    assert relative(grouped(x, C, norm.eps, scale[0], shift[0]), norm(x, (scale[:1], shift[:1]))) < 1e-6


def test_within_styled_each_norm_gives_what_it_reads_the_style_of_another_input() -> None:
    new = normswap.convert(network(), "adain", example_inputs=images())
    seen: list[Tensor] = []
    with normswap.styled(new, images(3, seed=2)) as model:
        hook = model[1].register_forward_hook(lambda module, args, out: seen.append(out))
        model(images())
        hook.remove()
    for mine, theirs in zip(moments(seen[0]), moments(new[0](images(3, seed=2))), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(new(images()), network()(images()))  # and after it as before


def test_an_input_in_its_own_style_passes_as_if_there_were_no_norm() -> None:
    model = network()
    new = normswap.convert(model, "adain", example_inputs=images())
    plain = nn.Sequential(*[nn.Identity() if isinstance(m, nn.InstanceNorm2d) else m for m in model])
    with normswap.styled(new, images()):
        assert relative(plain(images()), new(images())) < 1e-6


def test_one_style_serves_a_batch_and_gradients_reach_it() -> None:
    new, style = normswap.convert(network(), "adain", example_inputs=images()), images(1, seed=2).requires_grad_()
    with normswap.styled(new, style):
        out = new(images())
    out.sum().backward()
    assert style.grad is not None
    assert bool(style.grad.abs().sum() > 0)
    with normswap.styled(new, style.detach().repeat(3, 1, 1, 1)):
        assert relative(out, new(images())) < 1e-6


def test_a_style_that_cannot_run_leaves_no_trace() -> None:
    new = normswap.convert(network(), "adain", example_inputs=images())
    with pytest.raises(RuntimeError), normswap.styled(new, torch.randn(1, 4, 8, 8)):
        raise AssertionError
    assert new[1].style is None
    assert not new[1]._forward_hooks


def test_a_network_without_adain_is_an_error_that_says_how_to_get_it() -> None:
    with (
        pytest.raises(NetworkError, match="Sequential has no adain norm") as error,
        normswap.styled(network(), images()),
    ):
        raise AssertionError
    assert "to='adain'" in str(error.value) or 'to="adain"' in str(error.value)
