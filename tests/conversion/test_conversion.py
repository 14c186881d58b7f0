"""Converting: what must survive it, and what must not be left behind when it fails."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from typing import Any

import pytest
import torch
from helpers import (
    Net,
    Residual,
    X,
    bits,
    bn_eval,
    classes,
    contents,
    conv_bn,
    fingerprint,
    grouped,
    randomized,
    relative,
    run,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normswap
from normswap.conversion.record import Record, record_of
from normswap.errors import DataError, NormswapError, OptionError, PlanError, SelfCheckError
from normswap.norms.frozen import FrozenBatchNorm
from normswap.planning.plan import Plan

TARGETS = ["gn", "ln", "ln-channel", "in", "frozen", "bn", "sync", "renorm", "fused"]
AFFINE_TARGETS = [t for t in TARGETS if t not in ("frozen", "fused")]


def converted(net: nn.Module, to: str = "gn", **options: Any) -> nn.Module:
    groups = 2 if to == "gn" else None
    return normswap.convert(net, to=to, **{"groups": groups, **options})


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


# --- peers' edge cases ----------------------------------------------------------------------------------------------


def test_named_sequentials_lists_and_dicts_keep_their_names_and_order() -> None:
    class Containers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.named = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), norm0=nn.BatchNorm2d(4), act=nn.ReLU()))
            self.listed = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)])
            self.keyed = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1), "bn": nn.BatchNorm2d(4)})

        def forward(self, x: Tensor) -> Tensor:
            x = self.listed[1](self.listed[0](self.named(x)))
            return self.keyed["bn"](self.keyed["conv"](x))

    net = randomized(Containers())
    names = [name for name, _ in net.named_modules()]
    new = converted(net, "gn")
    assert [name for name, _ in new.named_modules()] == names
    assert all(isinstance(m, nn.GroupNorm) for m in (new.named.norm0, new.listed[1], new.keyed["bn"]))
    assert [step.transfer for step in new._normswap.plan.steps] == ["fold"] * 3


def test_a_parent_whose_add_module_and_setattr_raise_is_converted() -> None:
    class Stubborn(nn.Sequential):
        def add_module(self, name: str, module: nn.Module | None) -> None:
            if getattr(self, "closed", False):
                raise RuntimeError("no")
            super().add_module(name, module)

        def __setattr__(self, name: str, value: object) -> None:
            if isinstance(value, nn.Module):
                raise RuntimeError("no")
            super().__setattr__(name, value)

    net = Stubborn(*conv_bn(8)).eval()
    net.closed = True
    assert isinstance(converted(net, "gn", inplace=True)[1], nn.GroupNorm)


def test_a_convolution_used_twice_is_not_folded_into_and_a_norm_used_twice_is() -> None:
    class Reused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.bn, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.conv(self.bn(self.conv(x))))

    new = converted(randomized(Reused()), "ln")
    assert [(s.path, s.transfer) for s in new._normswap.plan.steps] == [("bn", "prescale"), ("other", "prescale")]
    assert new._normswap.check.passed

    class ReusedNorm(Reused):
        def forward(self, x: Tensor) -> Tensor:
            return self.other(x) + self.bn(self.conv(self.bn(self.conv(x))))

    new = converted(randomized(ReusedNorm()), "ln")
    assert [(s.path, s.transfer) for s in new._normswap.plan.steps] == [("bn", "fold"), ("other", "prescale")]
    assert new._normswap.check.passed


def test_a_network_without_any_norm_is_an_error() -> None:
    with pytest.raises(PlanError, match="Sequential has no norm layer"):
        normswap.convert(nn.Sequential(nn.Conv2d(3, 4, 1)), to="gn")


def test_a_model_that_cannot_be_copied_names_inplace_and_converts_in_place() -> None:
    class Single(Net):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("I am the only one")

    net = randomized(Single())
    with pytest.raises(NormswapError, match=r"Single cannot be deep-copied .*\n.*inplace=True"):
        normswap.convert(net, to="ln")
    assert classes(net) == ["Single", "Conv2d", "BatchNorm2d"]
    assert normswap.convert(net, to="ln", inplace=True)._normswap.check.passed


@pytest.mark.parametrize("to", TARGETS)
def test_the_original_is_untouched(to: str) -> None:
    net = nn.Sequential(conv_bn(8), nn.ReLU(), nn.BatchNorm2d(8)).train()
    before = fingerprint(net)
    new = converted(net, to)
    assert fingerprint(net) == before
    mine = {t.data_ptr() for t in (*new.parameters(), *new.buffers())}
    assert not mine & {t.data_ptr() for t in (*net.parameters(), *net.buffers())}


def test_memory_format_is_kept() -> None:
    net = conv_bn(8).to(memory_format=torch.channels_last)
    assert converted(net)[0].weight.is_contiguous(memory_format=torch.channels_last)
    reverted = normswap.revert(converted(net))
    assert reverted[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert contents(reverted) == contents(net)


def test_tied_weights_elsewhere_stay_tied() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(super().forward(x).mean((2, 3))))

    new = converted(randomized(Tied()), "ln")
    assert new.a.weight is new.b.weight


def test_the_converted_network_trains_on_a_batch_of_one() -> None:
    net = nn.Sequential(conv_bn(8), nn.Flatten(), nn.Linear(8 * 64, 2))
    new = converted(net, "gn").train()
    optimizer = torch.optim.SGD(new.parameters(), lr=0.01)
    before = contents(new)
    new(X[:1]).square().sum().backward()
    optimizer.step()
    assert all(before[name] != value for name, value in contents(new).items())


# --- the self-check -------------------------------------------------------------------------------------------------


def with_producers(made: Plan, producers: dict[str, tuple[str, ...]]) -> Plan:
    values = json.loads(made.to_json())
    for step in values["steps"]:
        step["producers"] = list(producers.get(step["path"], step["producers"]))
    return Plan.from_dict(values)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn2(self.b(self.bn1(self.a(x)).relu())).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "wrong",
    [{"bn1": ("b",), "bn2": ("a",)}, {"bn2": ("head",)}, {"bn2": ("b", "head")}, {"bn2": ()}],
    ids=["swapped", "another", "one too many", "none"],
)
@pytest.mark.parametrize("to", ["ln", "fused"])
def test_a_wrong_edge_is_caught_and_an_in_place_model_is_as_it_was(
    to: str, wrong: dict[str, tuple[str, ...]], dtype: torch.dtype
) -> None:
    net = randomized(Chain()).to(dtype)
    plan = with_producers(normswap.plan(net, to=to), wrong)
    before = fingerprint(net)
    for inplace in (False, True):
        with pytest.raises(SelfCheckError, match=r"the self-check failed at .*nothing was kept"):
            normswap.convert(net, using=plan, inplace=inplace, example_inputs=X.to(dtype))
        # In place, weights went there and back: the same bits in the same Parameter objects.
        assert fingerprint(net) == before


def test_a_layer_that_would_be_folded_into_twice_is_an_error() -> None:
    net = randomized(Chain())
    plan = with_producers(normswap.plan(net, to="ln"), {"bn2": ("a",)})
    with pytest.raises(PlanError, match=r"(?s)bn1: a is folded into more than once.*bn2: a is folded"):
        normswap.convert(net, using=plan)


def test_the_right_plan_passes_with_a_small_error() -> None:
    net = randomized(Chain())
    check = normswap.convert(net, using=normswap.plan(net, to="ln"))._normswap.check
    assert check.passed
    assert 0 <= check.error <= 1e-4
    assert (check.layers, check.total) == (2, 2)


def test_a_network_that_needs_the_old_norm_is_an_error_and_in_place_as_it_was() -> None:
    class Peeks(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.bn.running_var.mean()

    net = randomized(Peeks())
    before = fingerprint(net)
    with pytest.raises(SelfCheckError, match=r"does not run \(AttributeError: .*running_var.*nothing was kept"):
        normswap.convert(net, to="ln", inplace=True)
    assert fingerprint(net) == before


def test_an_interrupt_during_the_self_check_leaves_an_in_place_model_as_it_was() -> None:
    class Interrupted(Net):
        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(self.bn, nn.BatchNorm2d):
                raise KeyboardInterrupt
            return super().forward(x)

    net = randomized(Interrupted())
    before = fingerprint(net)
    with pytest.raises(KeyboardInterrupt):
        normswap.convert(net, to="ln", inplace=True)
    assert fingerprint(net) == before


def test_example_inputs_that_the_network_does_not_take_are_an_error() -> None:
    net = conv_bn(8)
    before = fingerprint(net)
    for options in ({"to": "ln"}, {"using": normswap.plan(net, to="ln")}):
        with pytest.raises(DataError, match="Sequential cannot run on the example inputs"):
            normswap.convert(net, example_inputs=torch.ones(1, 9), **options)
    assert fingerprint(net) == before


def test_where_no_input_is_known_the_check_says_so() -> None:
    class Picky(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) + y

    with pytest.warns(UserWarning, match="the self-check was not run: no input is known") as warned:
        check = converted(randomized(Picky()), "ln")._normswap.check
    assert len(warned) == 1
    assert (check.error, check.passed) == (None, False)
    assert "no input is known" in check.reason
    assert converted(randomized(Picky()), "ln", example_inputs=(X, torch.ones(())))._normswap.check.passed
    assert converted(randomized(Picky()), "ln", check=False)._normswap.check.reason == "not asked for"


def test_the_check_moves_no_statistics_and_takes_no_random_numbers() -> None:
    net = nn.Sequential(conv_bn(8), nn.Dropout(0.5), nn.BatchNorm2d(8)).train()
    state = torch.get_rng_state()
    new = converted(net, "renorm")
    assert torch.equal(torch.get_rng_state(), state)
    assert int(new[2].num_batches_tracked) == int(net[2].num_batches_tracked)
    assert torch.equal(new[0][1].running_mean, net[0][1].running_mean)


# --- ready plans ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [{"to": "ln"}, {"rules": {"*": "ln"}}, {"groups": 2}, {"eps": 1.0}, {"transfer": "copy"}]
)
def test_a_plan_and_what_to_plan_exclude_each_other(other: dict[str, Any]) -> None:
    net = conv_bn(8)
    with pytest.raises(OptionError, match="give either a plan"):
        normswap.convert(net, using=normswap.plan(net, to="ln"), **other)


def test_a_plan_applies_to_another_network_of_the_same_kind() -> None:
    plan = Plan.from_json(normswap.plan(randomized(Chain(), 1), to="ln").to_json())
    net = randomized(Chain(), 2)
    assert normswap.convert(net, using=plan)._normswap.check.passed


class Missing(Chain):
    def __init__(self) -> None:
        super().__init__()
        del self.bn2

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.bn1(self.a(x)))


class Wider(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.bn2 = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)


class OtherNorm(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.bn2 = nn.GroupNorm(1, 4)


class Stripped(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(4, track_running_stats=False)


class Replaced(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Sequential(nn.Conv2d(4, 4, 1))


class Aliased(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.bn2


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Missing, "bn2: there is no such layer"),
        (Wider, "bn2: it has 6 channels, the plan says 4"),
        (OtherNorm, "bn2: it is GroupNorm, the plan says bn"),
        (Stripped, "bn2: it has no running statistics"),
        (Replaced, "bn2: there is no layer to fold into at b"),
        (Aliased, "bn2: its names are bn2, again"),
    ],
)
def test_a_plan_for_another_network_is_one_clear_error(other: type[nn.Module], said: str) -> None:
    plan = normswap.plan(randomized(Chain()), to="gn", groups=2)
    net = randomized(other())
    before = fingerprint(net)
    with pytest.raises(PlanError, match=f"(?s)the plan does not fit this model:.*{said}"):
        normswap.convert(net, using=plan, inplace=True)
    assert fingerprint(net) == before


def test_every_layer_that_a_plan_does_not_fit_is_listed() -> None:
    plan = normswap.plan(randomized(Chain()), to="gn", groups=2)
    with pytest.raises(PlanError) as caught:
        normswap.convert(nn.Sequential(nn.Conv2d(3, 4, 1)), using=plan)
    assert caught.value.problems == ("bn1: there is no such layer", "bn2: there is no such layer")


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
