"""What a BN had learned, in its new place: against formulas written out here, and torch's own fusion."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import Residual, bits, bn_eval, broadcast, conv_bn, fingerprint, grouped, randomized, relative, run
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights

import normswap
from normswap.errors import PlanError
from normswap.norms._wrappers import ChannelAffine, NormSequence

LAYERS = {
    "Conv1d": (nn.Conv1d(4, 6, 3), (5, 4, 9)),
    "Conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    "Conv2d, zero padding": (nn.Conv2d(4, 6, 3, padding=2, bias=False), (2, 4, 5, 5)),
    "Conv2d, 2 groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "Conv2d, depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "Conv2d, reflected, dilated": (nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect"), (2, 4, 7, 7)),
    "Conv3d": (nn.Conv3d(4, 6, 2), (2, 4, 4, 4, 4)),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), (2, 4, 5, 5)),
    "ConvTranspose2d, 2 groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "ConvTranspose3d, depthwise": (nn.ConvTranspose3d(4, 8, 2, groups=4), (2, 4, 3, 3, 3)),
    "Linear": (nn.Linear(4, 6), (5, 4)),
    "Linear without bias": (nn.Linear(4, 6, bias=False), (5, 4)),
}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
PRECISION = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor]:
    """A layer with a BN behind it, and an input."""
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer)
    channels = getattr(layer, "out_channels", getattr(layer, "out_features", 0))
    after = (nn.Flatten(), nn.Unflatten(1, (channels,))) if len(shape) == 2 else ()  # takes vectors only
    net = randomized(nn.Sequential(layer, NORMS[len(shape)](channels, eps=1e-3), *after))
    return net.to(dtype), torch.randn(shape).to(dtype)


def standardized(bn: nn.Module, y: Tensor) -> Tensor:
    """`(y - mean) / sqrt(var + eps)` in float64."""
    mean, var = broadcast(bn.running_mean.double(), y), broadcast(bn.running_var.double(), y)
    return (y.detach().double() - mean) / (var + bn.eps).sqrt()


# --- fold -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_the_folded_layer_computes_the_standardized_output(name: str) -> None:
    net, x = pair(name)
    converted = normswap.convert(net, to="ln")
    assert converted._normswap.plan.steps[0].transfer == "fold"
    assert relative(standardized(net[1], net[0](x)), converted[0](x)) < 1e-6


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_folding_keeps_the_dtype_and_rounds_once(dtype: torch.dtype) -> None:
    net, _ = pair("Conv2d", dtype)
    converted = normswap.convert(net, to="ln", check=False)
    scale = (net[1].running_var.double() + 1e-3).rsqrt()
    weight = net[0].weight.detach().double() * scale.view(-1, 1, 1, 1)
    bias = (net[0].bias.detach().double() - net[1].running_mean.double()) * scale
    assert {t.dtype for t in converted.parameters()} == {dtype}
    assert relative(weight, converted[0].weight) < PRECISION[dtype]
    assert relative(bias, converted[0].bias) < PRECISION[dtype]


@pytest.mark.parametrize("transposed", [False, True])
def test_fusing_is_torchs_own_fusion(transposed: bool) -> None:
    net, _ = pair("ConvTranspose2d" if transposed else "Conv2d")
    layer, bn = net
    weight, bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias, transposed
    )
    fused = normswap.convert(net, to="fused")
    torch.testing.assert_close(fused[0].weight, weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(fused[0].bias, bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_the_fused_layer_computes_what_both_did(name: str) -> None:
    net, x = pair(name)
    assert relative(bn_eval(net[1], net[0](x)), run(normswap.convert(net, to="fused"), x).view_as(net(x))) < 1e-6


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_the_converted_network_is_group_norm_of_standardized_channels(groups: int) -> None:
    net, x = pair("Conv2d")
    expected = grouped(standardized(net[1], net[0](x)), groups, 1e-5, net[1].weight, net[1].bias)
    assert relative(expected, normswap.convert(net, to="gn", groups=groups)(x)) < 1e-5


@pytest.mark.parametrize("trained", [True, False])
def test_a_bias_that_folding_adds_trains_if_the_weight_does(trained: bool) -> None:
    net = conv_bn(8)
    net[0].weight.requires_grad_(trained)
    converted = normswap.convert(net, to="ln")
    assert net[0].bias is None
    assert converted[0].bias.requires_grad is trained


def test_a_channel_of_no_variance_folds_by_eps() -> None:
    net, x = pair("Conv2d")
    net[1].running_var[2] = 0.0
    converted = normswap.convert(net, to="ln")
    assert relative(standardized(net[1], net[0](x)), converted[0](x)) < 1e-6


def test_several_layers_that_feed_one_norm_are_all_folded_into() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.b(self.bn(self.a(x)).relu()))

    net, x = randomized(Two()), torch.randn(2, 3, 5, 5)
    net.a.bias = None
    converted = normswap.convert(net, to="ln")
    assert converted.a.bias.data_ptr() != converted.b.bias.data_ptr()
    assert converted._normswap.plan.steps[0].producers == ("a", "b")
    z = torch.randn(2, 4, 5, 5)
    assert relative(standardized(net.bn, net.a(x)), converted.a(x)) < 1e-6
    assert relative(standardized(net.bn, net.b(z)), converted.b(z)) < 1e-6


# --- prescale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 6), (2, 6, 4), (2, 6, 3, 3), (2, 6, 2, 2, 2)])
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_prescaling_standardizes_the_input_of_the_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    net = randomized(nn.Sequential(nn.ReLU(), NORMS[len(shape)](6, eps=1e-3))).to(dtype)
    x = torch.randn(shape).to(dtype)
    converted = normswap.convert(net, to="ln", example_inputs=x)
    layer = converted[1]
    assert isinstance(layer, NormSequence)
    assert isinstance(layer.standardize, ChannelAffine)
    assert layer.standardize(x).dtype is dtype
    assert relative(standardized(net[1], x), layer.standardize(x)) < PRECISION[dtype] * 2
    assert torch.equal(layer.norm.weight, net[1].weight)
    expected = grouped(standardized(net[1], x.relu()), 1, 1e-5, net[1].weight, net[1].bias)
    assert relative(expected, converted(x)) < PRECISION[dtype] * 10


def test_what_prescaling_adds_is_saved_and_not_trained() -> None:
    net = randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6)))
    converted = normswap.convert(net, to="ln")
    assert set(converted.state_dict()) == {
        "1.standardize.scale", "1.standardize.shift", "1.norm.weight", "1.norm.bias",
    }  # fmt: skip
    assert {name for name, _ in converted.named_parameters()} == {"1.norm.weight", "1.norm.bias"}
    assert converted[1].weight is converted[1].norm.weight
    assert converted[1].bias is converted[1].norm.bias


# --- eps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1.0, 4.0])
@pytest.mark.parametrize("target", ["gn", "ln", "in", "ln-channel"])
def test_under_eps_a_channel_of_unit_variance_passes_unchanged(target: str, eps: float) -> None:
    net = randomized(nn.Sequential(nn.Identity(), nn.BatchNorm2d(4, eps=0.0)))
    net[1].running_mean.zero_()
    net[1].running_var.fill_(1.0)
    converted = normswap.convert(net, to=target, eps=eps, groups=2 if target == "gn" else None)
    # Mean 0 and variance 1 over whatever the norm reduces: pixels, channels, or both.
    x = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    expected = x.double() * broadcast(net[1].weight.double(), x) + broadcast(net[1].bias.double(), x)
    assert relative(expected, converted(x)) < 1e-6
    assert converted._normswap.check.passed


def test_eps_scales_gamma_by_the_root_of_one_plus_eps() -> None:
    net = conv_bn(8)
    converted = normswap.convert(net, to="ln", eps=3.0)
    torch.testing.assert_close(converted[1].weight, net[1].weight * 2)
    assert torch.equal(converted[1].bias, net[1].bias)
    assert converted[1].eps == 3.0


@pytest.mark.parametrize("transfer", ["copy", "reset"])
def test_eps_without_folding_leaves_gamma_alone(transfer: str) -> None:
    net = conv_bn(8)
    converted = normswap.convert(net, to="ln", eps=3.0, transfer=transfer)
    expected = net[1].weight if transfer == "copy" else torch.ones(8)
    assert torch.equal(converted[1].weight, expected)
    assert converted[1].eps == 3.0


def test_a_norm_without_gamma_gets_a_fixed_one_for_eps() -> None:
    net = conv_bn(8, affine=False)
    converted = normswap.convert(net, to="ln", eps=3.0)
    assert torch.equal(converted[1].weight, torch.full((8,), 2.0))
    assert not converted[1].weight.requires_grad
    x = torch.randn(2, 3, 5, 5)
    expected = grouped(standardized(net[1], net[0](x)), 1, 3.0) * 2
    assert relative(expected.relu(), converted(x)) < 1e-5


def test_a_gamma_that_two_norms_share_is_scaled_once() -> None:
    net = nn.Sequential(conv_bn(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    net[2].weight = net[0][1].weight
    before = net[2].weight.detach().clone()
    converted = normswap.convert(randomized(net), to="ln", eps=3.0)
    before = net[2].weight.detach()
    torch.testing.assert_close(converted[2].weight, before * 2)
    assert converted[2].weight is converted[0][1].weight
    reverted = normswap.revert(converted)
    assert torch.equal(reverted[2].weight, before)


@pytest.mark.parametrize("change", [{"eps": 1.0}, {"zero_init_residual": True}])
def test_a_gamma_tied_to_a_layer_that_stays_is_an_error(change: dict[str, Any]) -> None:
    net = randomized(Residual())
    net.bn2.weight = net.bn1.weight
    before = fingerprint(net)
    with pytest.raises(PlanError, match=r"bn2: its gamma is tied to another layer's, so (eps|zero_init_residual)"):
        normswap.convert(net, to="ln", rules={"bn1": "keep"}, inplace=True, **change)
    assert fingerprint(net) == before


@pytest.mark.parametrize("change", [{"eps": 1.0}, {"zero_init_residual": True}])
def test_a_parametrized_gamma_that_would_be_changed_is_an_error(change: dict[str, Any]) -> None:
    net = randomized(Residual())
    parametrize.register_parametrization(net.bn2, "weight", nn.Softplus())
    before = fingerprint(net)
    with pytest.raises(PlanError, match="bn2: its gamma is parametrized, so"):
        normswap.convert(net, to="ln", inplace=True, **change)
    assert fingerprint(net) == before


# --- zero_init_residual -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_init_lets_every_residual_block_begin_as_the_identity(dtype: torch.dtype) -> None:
    net = randomized(Residual()).to(dtype)
    net.bn2.bias.data.zero_()
    converted = normswap.convert(net, to="ln", zero_init_residual=True)
    assert converted._normswap.check.passed
    x = torch.randn(2, 4, 5, 5, dtype=dtype)
    assert torch.equal(converted(x), x.relu())
    assert bool(converted.bn1.weight.all())
    assert converted.bn2.weight.requires_grad


# --- copy and reset ---------------------------------------------------------------------------------------------


def test_copy_carries_gamma_and_beta_over_and_nothing_else() -> None:
    net, x = pair("Conv2d")
    converted = normswap.convert(net, to="gn", groups=2, transfer="copy")
    assert bits(converted[0].weight) == bits(net[0].weight)
    assert bits(converted[0].bias) == bits(net[0].bias)
    assert relative(grouped(net[0](x), 2, 1e-5, net[1].weight, net[1].bias), converted(x)) < 1e-5
    assert converted._normswap.check.error is None
    assert "does not keep the outputs" in converted._normswap.check.reason


@pytest.mark.parametrize("target", ["gn", "ln", "in", "ln-channel", "bn", "sync", "renorm"])
def test_reset_leaves_every_norm_as_a_new_one(target: str) -> None:
    net = conv_bn(8)
    net[1].weight.requires_grad_(False)
    converted = normswap.convert(net, to=target, transfer="reset", groups=2 if target == "gn" else None)
    assert bits(converted[0].weight) == bits(net[0].weight)
    assert torch.equal(converted[1].weight, torch.ones(8))
    assert torch.equal(converted[1].bias, torch.zeros(8))
    assert not converted[1].weight.requires_grad
    assert converted[1].bias.requires_grad
    if target in ("bn", "sync", "renorm"):
        assert torch.equal(converted[1].running_mean, torch.zeros(8))
        assert torch.equal(converted[1].running_var, torch.ones(8))
        assert int(converted[1].num_batches_tracked) == 0


# --- values that no conversion can stand on -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("running_var", -0.5, r"running_var is negative \(-0\.5\)"),
        ("running_var", -1e-6, r"running_var is negative \(-1e-06\)"),
        ("running_var", float("nan"), "running statistics hold NaN or Inf"),
        ("running_mean", float("nan"), "running statistics hold NaN or Inf"),
        ("running_mean", float("inf"), "running statistics hold NaN or Inf"),
    ],
)
@pytest.mark.parametrize("target", ["ln", "frozen", "fused", "bn"])
def test_damaged_statistics_are_named_layer_by_layer(target: str, name: str, value: float, said: str) -> None:
    net = nn.Sequential(conv_bn(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    getattr(randomized(net)[0][1], name)[1] = value
    getattr(net[4], name)[0] = value
    before = fingerprint(net)
    with pytest.raises(PlanError, match=rf"2 layers with .*\n  0\.1: {said}\n  4: {said}\n.*damaged"):
        normswap.convert(net, to=target, inplace=True)
    assert fingerprint(net) == before
    assert (
        len(normswap.convert(net, to=target, rules={"0": "keep", "4": "keep"}, check=False)._normswap.plan.steps) == 1
    )


def test_damaged_statistics_do_not_stand_in_the_way_of_copy() -> None:
    net = conv_bn(4)
    net[1].running_var[0] = -1.0
    assert torch.equal(normswap.convert(net, to="ln", transfer="copy")[1].weight, net[1].weight)


def test_a_variance_of_0_without_eps_is_named() -> None:
    net = conv_bn(4, eps=0.0)
    net[1].running_var[0] = 0.0
    with pytest.raises(PlanError, match=r"1: running_var \+ eps is 0 in some channel"):
        normswap.convert(net, to="ln")


@pytest.mark.parametrize("target", ["ln", "fused"])
def test_a_fold_that_leaves_the_range_of_float16_is_refused(target: str) -> None:
    net = conv_bn(4, bias=True)
    net[1].running_var[1] = 1e-7
    net[0].weight.data[1] = 900.0
    net[1].weight.data.fill_(1.0)
    assert normswap.convert(net, to=target)._normswap.check.passed
    net.half()
    before = fingerprint(net)
    with pytest.raises(PlanError, match="1: folded into 0, it leaves the range of float16; convert in float32 first"):
        normswap.convert(net, to=target, inplace=True)
    assert fingerprint(net) == before


# --- quiet channels ---------------------------------------------------------------------------------------------------


def _quiet_network(var: list[float], mean: float = 0.3, bias: bool = True) -> nn.Module:
    """A convolution and a BN of eps 1e-3 whose running statistics fit the standard normal input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, len(var), 1, bias=bias), nn.BatchNorm2d(len(var), eps=1e-3)).eval()
    with torch.no_grad():
        wanted = torch.tensor(var)
        model[0].weight.copy_(nn.functional.normalize(model[0].weight.flatten(1)).view_as(model[0].weight))
        model[0].weight.mul_(wanted.sqrt().view(-1, 1, 1, 1))
        if bias:
            model[0].bias.fill_(mean)
        model[1].running_mean.fill_(mean if bias else 0.0)
        model[1].running_var.copy_(wanted)
        model[1].weight.uniform_(0.5, 2)
        model[1].bias.normal_()
    return model


@pytest.mark.parametrize("eps", [None, 1.0])
def test_quiet_channels_enter_their_group_with_variance_one(eps):
    model = _quiet_network([1e-5, 1e-4, 3e-4, 1e-2, 1.0, 30.0])
    x = torch.randn(64, 3, 16, 16)
    converted = normswap.convert(model, "gn", groups=1, eps=eps)
    inputs = converted[0](x)
    torch.testing.assert_close(inputs.var((0, 2, 3)), torch.ones(6), rtol=0.05, atol=0)
    # With the statistics of all samples in the place of each sample's own, the norm is BN.
    scale = converted[1].weight / (1 + (eps or 0.0)) ** 0.5
    bare = inputs * scale.view(1, -1, 1, 1) + converted[1].bias.view(1, -1, 1, 1)
    torch.testing.assert_close(bare, model(x), rtol=1e-4, atol=1e-4)


def test_a_channel_that_was_dead_in_training_does_not_drown_its_group_when_it_wakes():
    model = _quiet_network([1.0] * 7 + [1e-12], bias=False)
    converted = normswap.convert(model, "gn", groups=1)
    x = torch.randn(8, 3, 16, 16)
    asleep = converted(x)
    with torch.no_grad():  # the eighth channel now varies by what BN makes a standard deviation of gamma of
        converted[0].weight[7] *= (model[1].eps / 1e-12) ** 0.5
    awake = converted(x)
    ratio = (awake[:, :7] - converted[1].bias[:7].view(1, -1, 1, 1)).std() / (
        asleep[:, :7] - converted[1].bias[:7].view(1, -1, 1, 1)
    ).std()
    assert ratio > 0.85


def test_gammas_of_channels_louder_than_eps_keep_their_bits():
    model = _quiet_network([1.1, 2.0, 30.0])
    converted = normswap.convert(model, "gn", groups=1)
    assert torch.equal(converted[1].weight, model[1].weight)


def test_quiet_channels_go_back_to_the_bit_through_a_file(tmp_path):
    model = _quiet_network([1e-5, 1e-4, 3e-4, 1e-2, 1.0, 30.0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    converted = normswap.convert(model, "gn", groups=2)
    x = torch.randn(2, 3, 8, 8)
    loaded = normswap.load(normswap.save(converted, tmp_path / "n.safetensors"), model=_quiet_network([1.0] * 6))
    assert torch.equal(loaded(x), converted(x))
    after = normswap.revert(loaded).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_quiet_channels_of_a_tied_gamma_are_left_as_bn_leaves_them():
    model = nn.Sequential(_quiet_network([1e-4] * 4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    model[2].weight = model[0][1].weight
    converted = normswap.convert(model, "gn", groups=1)
    assert torch.equal(converted[2].weight, model[2].weight)
    assert converted[2].weight is converted[0][1].weight


def test_plans_made_before_quiet_channels_were_known_still_read():
    made = normswap.plan(_quiet_network([1e-4] * 4), "gn", groups=1).to_dict()
    for step in made["steps"]:
        del step["unit"]
    assert not normswap.Plan.from_dict(made).steps[0].unit
