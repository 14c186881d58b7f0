"""Converting: what must survive it."""

from __future__ import annotations

import copy

import pytest
import torch
from convertible import AFFINE_TARGETS, TARGETS, converted
from helpers import Residual, X, bits, bn_eval, contents, conv_bn, fingerprint, grouped, randomized, relative, run
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normswap
from normswap.conversion.record import Record, record_of
from normswap.errors import PlanError
from normswap.norms.frozen import FrozenBatchNorm

# --- what people lose with other tools ------------------------------------------------------------------------------


@pytest.mark.parametrize("to", AFFINE_TARGETS)
def test_gamma_and_beta_are_carried_over(to: str) -> None:
    net = conv_bn(8)
    assert torch.equal(converted(net, to)[1].weight, net[1].weight)
    assert torch.equal(converted(net, to)[1].bias, net[1].bias)


@pytest.mark.parametrize("to", ["frozen", "bn", "sync", "renorm"])
def test_eps_and_momentum_are_carried_over_where_the_target_keeps_them(to: str) -> None:
    net = conv_bn(8, eps=0.02, momentum=0.3)
    new = converted(net, to)[1]
    assert new.eps == 0.02
    assert getattr(new, "momentum", 0.3) == 0.3
    assert converted(net, to, eps=0.5, check=False)[1].eps == 0.5


@pytest.mark.parametrize("to", ["gn", "ln", "in", "ln-channel"])
def test_per_sample_norms_take_their_usual_eps_or_the_one_asked_for(to: str) -> None:
    net = conv_bn(8, eps=0.02)
    assert converted(net, to)[1].eps == 1e-5
    assert converted(net, to, eps=0.5)[1].eps == 0.5


@pytest.mark.parametrize("to", ["gn", "ln", "in", "ln-channel"])
def test_the_running_statistics_are_used(to: str) -> None:
    net = conv_bn(8)
    twin = copy.deepcopy(net)
    twin[1].running_mean.add_(1.0)
    a, b = converted(net, to), converted(twin, to)
    assert not torch.equal(a[0].weight, net[0].weight)
    torch.testing.assert_close(a[0].weight, b[0].weight)
    scale = (net[1].running_var + net[1].eps).rsqrt()
    torch.testing.assert_close(a[0].bias - b[0].bias, scale)


@pytest.mark.parametrize("channels", [7, 8, 88, 97])
def test_any_number_of_channels_divides_by_the_default_groups(channels: int) -> None:
    new = normswap.convert(conv_bn(channels), to="gn")[1]
    assert channels % new.num_groups == 0
    assert channels // new.num_groups > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("to", TARGETS)
def test_the_dtype_is_kept_and_the_surgery_proven(to: str, dtype: torch.dtype) -> None:
    net = conv_bn(8).to(dtype)
    new = converted(net, to)
    assert {t.dtype for t in (*new.parameters(), *new.buffers()) if t.is_floating_point()} == {dtype}
    assert new._normswap.check.passed
    assert new(X.to(dtype)).dtype is dtype


@pytest.mark.parametrize("to", TARGETS)
def test_a_meta_model_converts_without_leaving_the_meta_device(to: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to("meta")
    new = converted(net, to)
    assert all(t.is_meta for t in (*new.parameters(), *new.buffers()))
    assert new._normswap.check.reason == "the model is on the meta device and cannot run"


@pytest.mark.parametrize("to", TARGETS)
def test_every_training_flag_is_kept(to: str) -> None:
    net = nn.Sequential(conv_bn(8), nn.Identity(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    net.train()
    net[0][1].eval()
    new = converted(net, to)
    assert (new[0][1].training, new[3].training, new[0].training, new.training) == (False, True, True, True)


@pytest.mark.parametrize("to", AFFINE_TARGETS)
def test_requires_grad_is_kept(to: str) -> None:
    net = conv_bn(8)
    net[0].weight.requires_grad_(False)
    net[1].weight.requires_grad_(False)
    new = converted(net, to)
    assert not new[0].weight.requires_grad
    assert not new[1].weight.requires_grad
    assert new[1].bias.requires_grad


@pytest.mark.parametrize("to", AFFINE_TARGETS)
def test_in_place_gamma_and_beta_stay_the_same_parameter_objects(to: str) -> None:
    net = conv_bn(8)
    weight, bias, conv = net[1].weight, net[1].bias, net[0].weight
    new = converted(net, to, inplace=True)
    assert new is net
    assert new[1].weight is weight
    assert new[1].bias is bias
    assert new[0].weight is conv


class Parents(nn.Module):
    """One BN under two parents, and by two names in one parent."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.one = nn.Sequential(nn.BatchNorm2d(8))
        self.two = nn.ModuleDict({"x": self.one[0]})
        self.bn = self.also = self.one[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.conv(x)) + self.two["x"](self.conv(x)) + self.also(self.conv(x)) + self.bn(self.conv(x))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("to", TARGETS)
def test_a_shared_norm_stays_one_module_under_all_its_names(to: str, inplace: bool) -> None:
    net = randomized(Parents())
    expected = 4 * bn_eval(net.bn, net.conv(X))
    new = converted(net, to, inplace=inplace)
    assert new.one[0] is new.two["x"] is new.bn is new.also
    assert not isinstance(new.bn, nn.BatchNorm2d) or to == "bn"
    if to in ("frozen", "bn", "sync", "renorm", "fused"):
        assert relative(expected.flatten(), run(new, X)) < 1e-5


@pytest.mark.parametrize(("dims", "shape"), [(1, (2, 3, 9)), (2, (2, 3, 7, 7)), (3, (2, 3, 5, 5, 5))])
@pytest.mark.parametrize("to", TARGETS)
def test_1d_2d_and_3d_batch_norms_convert(to: str, dims: int, shape: tuple[int, ...]) -> None:
    net, x = conv_bn(8, dims=dims), torch.randn(shape)
    new = converted(net, to)
    assert new._normswap.check.passed
    y = net[0](x)
    standard = bn_eval(net[1], y)
    if to in ("frozen", "bn", "sync", "renorm", "fused"):
        assert relative(standard.relu(), new(x)) < 1e-5
    elif to != "ln-channel":
        mean = net[1].running_mean.double().view(1, -1, *[1] * dims)
        std = (net[1].running_var.double() + net[1].eps).sqrt().view(1, -1, *[1] * dims)
        groups = {"gn": 2, "ln": 1, "in": 8}[to]
        expected = grouped((y.double() - mean) / std, groups, 1e-5, net[1].weight, net[1].bias)
        assert relative(expected.relu(), new(x)) < 1e-5


@pytest.mark.parametrize("to", [t for t in TARGETS if t != "in"])
def test_vectors_convert(to: str) -> None:
    net = randomized(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)))
    new = converted(net, to)
    assert new._normswap.check.passed
    assert new(torch.randn(3, 5)).shape == (3, 8)


@pytest.mark.parametrize("to", TARGETS)
def test_a_norm_without_gamma_and_beta_converts(to: str) -> None:
    net = conv_bn(8, affine=False)
    new = converted(net, to)
    assert new._normswap.check.passed
    assert new._normswap.plan.steps[0].path == "1"
    if to in ("bn", "sync", "renorm", "gn", "in"):
        assert new[1].affine is False
        assert new[1].weight is None


@pytest.mark.parametrize("to", ["gn", "ln", "in", "ln-channel"])
def test_a_norm_without_running_statistics_carries_gamma_and_beta_over(to: str) -> None:
    net = conv_bn(8, track_running_stats=False)
    new = converted(net, to)
    assert torch.equal(new[1].weight, net[1].weight)
    assert bits(new[0].weight) == bits(net[0].weight)


@pytest.mark.parametrize("to", ["frozen", "sync", "renorm", "fused"])
def test_a_norm_without_running_statistics_is_a_clear_error_where_the_target_needs_them(to: str) -> None:
    net = conv_bn(8, track_running_stats=False)
    before = fingerprint(net)
    with pytest.raises(PlanError, match=rf"1 \(BatchNorm2d\): {to} needs running statistics"):
        converted(net, to, inplace=True)
    assert fingerprint(net) == before


@pytest.mark.parametrize("undo", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_with_and_without_statistics_are_proven_together(dtype: torch.dtype, undo: bool) -> None:
    net = nn.Sequential(conv_bn(8), conv_bn(8, track_running_stats=False)[1].train(), nn.Conv2d(8, 4, 1)).to(dtype)
    new = converted(net, "gn", undo=undo)
    assert new._normswap.check.passed
    assert new[1].training
    if undo:
        assert [m.training for m in normswap.revert(new).modules()] == [m.training for m in net.modules()]


@pytest.mark.parametrize("to", TARGETS)
def test_an_activation_fused_into_the_norm_stays(to: str) -> None:
    timm = pytest.importorskip("timm.layers")
    layer = randomized(timm.BatchNormAct2d(8, act_layer=nn.SiLU))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), layer)
    expected = nn.functional.silu(bn_eval(layer, net[0](X)))
    new = converted(net, to)
    assert new[1].act is not layer.act
    assert isinstance(new[1].act, nn.SiLU)
    assert new._normswap.check.passed
    if to in ("frozen", "bn", "sync", "renorm", "fused"):
        assert relative(expected, new(X)) < 1e-5
    assert contents(normswap.revert(new)) == contents(net)
    assert type(new[1]) is timm.BatchNormAct2d


@pytest.mark.parametrize("source", ["torchvision", "timm", "transformers", "normswap"])
@pytest.mark.parametrize("to", ["gn", "bn", "sync", "fused"])
def test_a_frozen_batch_norm_is_a_source(source: str, to: str) -> None:
    if source == "torchvision":
        from torchvision.ops import FrozenBatchNorm2d as Frozen
    elif source == "timm":
        Frozen = pytest.importorskip("timm.layers.norm_act").FrozenBatchNormAct2d
    elif source == "transformers":
        Frozen = pytest.importorskip("transformers.models.detr.modeling_detr").DetrFrozenBatchNorm2d
    else:
        Frozen = FrozenBatchNorm
    net = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), Frozen(8)))
    new = converted(net, to)
    assert new._normswap.check.passed
    assert bits(new._normswap.undo.norms[0].tensors["weight"]) == bits(net[1].weight)
    if to != "gn":
        assert relative(run(net, X), run(new, X)) < 1e-5
    if to in ("gn", "bn", "sync"):
        norm = getattr(new[1], "norm", new[1])
        assert isinstance(norm.weight, nn.Parameter)
        assert norm.weight.data_ptr() != net[1].weight.data_ptr()


def test_a_lazy_batch_norm_is_a_clear_error() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LazyBatchNorm2d())
    with pytest.raises(PlanError, match=r"1 \(LazyBatchNorm2d\): it is not initialised: run one forward pass first"):
        normswap.convert(net, to="gn", inplace=True)
    assert type(net[1]) is nn.LazyBatchNorm2d
    net(X)
    assert normswap.convert(net.eval(), to="gn")._normswap.check.passed


@pytest.mark.parametrize("to", TARGETS)
def test_hooks_still_run_and_their_handles_still_remove_them(to: str) -> None:
    net = conv_bn(8)
    calls: list[str] = []
    handle = net[1].register_forward_hook(lambda m, a, out: calls.append(type(m).__name__))
    new = converted(net, to, inplace=True)
    calls.clear()
    new(X)
    assert calls == [type(new[1]).__name__]
    handle.remove()
    new(X)
    assert len(calls) == 1


def test_a_hook_that_changes_the_output_still_does() -> None:
    net = conv_bn(8)
    net[1].register_forward_hook(lambda m, a, out: out * 3)
    new = converted(net, "frozen")
    assert relative(3 * bn_eval(net[1], net[0](X)).relu(), new(X)) < 1e-5
    assert new._normswap.check.passed


@pytest.mark.parametrize("to", TARGETS)
def test_attributes_and_what_was_registered_on_a_norm_stay(to: str) -> None:
    net = conv_bn(8)
    net[1].note, net[1].tags = "mine", ["a"]
    net[1].register_buffer("counter", torch.ones(2))
    net[1].register_buffer("scratch", torch.ones(2), persistent=False)
    net[1].register_parameter("extra", nn.Parameter(torch.ones(3)))
    new = converted(net, to)
    assert (new[1].note, new[1].tags) == ("mine", ["a"])
    assert {"1.counter", "1.extra"} <= set(new.state_dict())
    assert "1.scratch" not in new.state_dict()
    assert torch.equal(new[1].scratch, torch.ones(2))


@pytest.mark.parametrize("to", ["gn", "bn", "sync", "renorm"])
def test_a_parametrized_gamma_stays_parametrized(to: str) -> None:
    net = conv_bn(8)
    parametrize.register_parametrization(net[1], "weight", nn.Softplus())
    original = net[1].parametrizations.weight.original
    gamma = net[1].weight.detach().clone()
    new = converted(net, to, inplace=True)
    assert parametrize.is_parametrized(new[1], "weight")
    assert new[1].parametrizations.weight.original is original
    assert torch.equal(new[1].weight, gamma)
    original.data.add_(1.0)
    assert not torch.equal(new[1].weight, gamma)
    assert new._normswap.check.passed


def test_a_parametrized_gamma_is_baked_into_a_frozen_norm() -> None:
    net = conv_bn(8)
    parametrize.register_parametrization(net[1], "weight", nn.Softplus())
    new = converted(net, "frozen")
    assert relative(run(net, X), run(new, X)) < 1e-5


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_root_that_is_the_norm_is_converted(to: str, inplace: bool) -> None:
    bn = randomized(nn.BatchNorm2d(8))
    x = torch.randn(2, 8, 3, 3)
    before = bits(bn.weight)
    new = converted(bn, to, inplace=inplace)
    assert type(new) is not nn.BatchNorm2d or to == "bn"
    assert record_of(new).check.passed
    if to in ("frozen", "bn", "sync", "renorm", "fused"):
        assert relative(bn_eval(bn, x), new(x)) < 1e-5
    assert bits(bn.weight) == before


# --- the record -----------------------------------------------------------------------------------------------------


def test_a_converted_network_remembers_how_it_was_made() -> None:
    net = randomized(Residual())
    assert record_of(net) is None
    new = converted(net, "gn", rules={"bn2": "frozen"})
    record = record_of(new)
    assert isinstance(record, Record)
    assert [step.target for step in record.plan.steps] == ["gn", "frozen"]
    assert record.check.passed
    assert not record.calibrated
    assert "_normswap" not in str(new.state_dict().keys())


def test_the_converted_networks_code_needs_nothing_of_normswap_for_plain_norms() -> None:
    new = converted(conv_bn(8), "gn")
    assert type(new[1]) is nn.GroupNorm
    assert set(new.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
