"""What every registered norm has to keep. A new norm's test holds its formula in an `EXPECTED` of its own."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import bn_eval, broadcast, conv_bn, grouped, randomized, relative, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import normswap
from normswap.errors import OptionError
from normswap.norms._wrappers import ChannelAffine
from normswap.norms.registry import exact_from, identify, norm_named, register, specs, targets
from normswap.norms.spec import DoesNotFit, NormRequest, NormSpec, NormState

C, GROUPS = 8, 2
SHAPES = {"vectors": (5, C), "1d": (5, C, 6), "2d": (3, C, 4, 5), "3d": (2, C, 3, 4, 2)}
DIMS = {"vectors": 1, "1d": 1, "2d": 2, "3d": 3}
BN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
NAMES_READ = {"ln": "gn"}  # `ln` is built as torch's GroupNorm with one group
BATCH_TYPES = tuple(spec.name for spec in specs() if spec.needs_statistics and not spec.fuses)
LEAVING_A_NORM = [spec.name for spec in specs() if spec.build and not spec.fuses]
CHANNELS_SECOND = [spec.name for spec in specs() if spec.build and spec.channel_dim == 1]


def _over_channels(x: Tensor, bn: nn.Module, eps: float) -> Tensor:
    wide = x.double()
    mean = wide.mean(1, keepdim=True)
    var = ((wide - mean) ** 2).mean(1, keepdim=True)
    y = (wide - mean) / (var + eps).sqrt()
    return y if bn.weight is None else y * broadcast(bn.weight.double(), x) + broadcast(bn.bias.double(), x)


# What a layer built from a BN computes in eval mode, with eps 1e-5 where the target does not keep the BN's.
EXPECTED: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "bn": lambda x, bn: bn_eval(bn, x),
    "sync": lambda x, bn: bn_eval(bn, x),
    "renorm": lambda x, bn: bn_eval(bn, x),
    "frozen": lambda x, bn: bn_eval(bn, x),
    "fused": lambda x, bn: bn_eval(bn, x),
    "gn": lambda x, bn: grouped(x, GROUPS, 1e-5, bn.weight, bn.bias),
    "ln": lambda x, bn: grouped(x, 1, 1e-5, bn.weight, bn.bias),
    "in": lambda x, bn: grouped(x, C, 1e-5, bn.weight, bn.bias),
    "ln-channel": lambda x, bn: _over_channels(x, bn, 1e-5),
}
for _file in sorted(Path(__file__).parent.glob("test_*.py")):
    if _file != Path(__file__):
        EXPECTED |= getattr(importlib.import_module(_file.stem), "EXPECTED", {})


def batch_norm(dims: int = 2, **kwargs: object) -> nn.Module:
    return randomized(BN[dims](C, eps=2e-3, momentum=0.3, **kwargs))


def build(name: str, bn: nn.Module) -> nn.Module:
    spec = norm_named(name)
    state = norm_named("bn").read(bn)
    groups = GROUPS if spec.takes_groups else None
    return spec.build(state, spec.fit(state, NormRequest(groups=groups)))


def seen(name: str, x: Tensor) -> Tensor:
    """`(N, C, *)`, and the output back to that, as the norm takes it, whose channels may be the last dimension."""
    return x.movedim(norm_named(name).channel_dim, 1)


def outputs(name: str, layer: nn.Module, x: Tensor) -> Tensor:
    """Of a built layer in eval mode for an `(N, C, *)`; so are they."""
    moved = x.movedim(1, norm_named(name).channel_dim)
    return seen(name, run(layer, moved).view(moved.shape))


def cases() -> list[tuple[str, str]]:
    # InstanceNorm on vectors is refused by the plan: each channel would be a single value.
    return [
        (name, shape) for name in targets() for shape in SHAPES if not (name in ("in", "adain") and shape == "vectors")
    ]


def test_every_target_has_a_formula_here() -> None:
    assert set(targets()) == set(EXPECTED)


@pytest.mark.parametrize(("name", "shape"), cases())
def test_the_built_layer_computes_its_formula(name: str, shape: str) -> None:
    bn = batch_norm(DIMS[shape])
    x = torch.randn(SHAPES[shape])
    assert relative(EXPECTED[name](x, bn), outputs(name, build(name, bn), x)) < 1e-6


@pytest.mark.parametrize(("name", "shape"), cases())
def test_without_gamma_and_beta_the_built_layer_computes_its_formula(name: str, shape: str) -> None:
    bn = batch_norm(DIMS[shape], affine=False)
    x = torch.randn(SHAPES[shape])
    assert relative(EXPECTED[name](x, bn), outputs(name, build(name, bn), x)) < 1e-6


@pytest.mark.parametrize("name", targets())
def test_with_gamma_and_no_beta_the_built_layer_computes_its_formula(name: str) -> None:
    bn = batch_norm()
    full = copy.deepcopy(bn)
    full.bias.data.zero_()
    bn.register_parameter("bias", None)
    x = torch.randn(SHAPES["2d"])
    assert relative(EXPECTED[name](x, full), outputs(name, build(name, bn), x)) < 1e-6


@pytest.mark.parametrize("name", LEAVING_A_NORM)
def test_a_built_layer_is_recognised_as_its_own_type(name: str) -> None:
    assert identify(build(name, batch_norm())).name == NAMES_READ.get(name, name)


@pytest.mark.parametrize("name", LEAVING_A_NORM)
@pytest.mark.parametrize("affine", [True, False])
def test_what_is_built_reads_back_as_it_was(name: str, affine: bool) -> None:
    bn = batch_norm(affine=affine).train()
    layer = build(name, bn)
    state = identify(layer).read(layer)
    assert state.channels == C
    assert state.training is True
    assert state.dims in (None, 2)
    keeps_eps = name in BATCH_TYPES
    assert state.eps == (2e-3 if keeps_eps else 1e-5)
    if affine:
        assert torch.equal(state.weight, bn.weight)
        assert torch.equal(state.bias, bn.bias)
    elif not norm_named(name).fixed:  # a frozen BN always has gamma and beta
        assert state.weight is None
        assert state.bias is None
    if name in BATCH_TYPES:
        assert torch.equal(state.running_mean, bn.running_mean)
        assert torch.equal(state.running_var, bn.running_var)


@pytest.mark.parametrize("name", [spec.name for spec in specs() if spec.updates_statistics])
def test_momentum_and_the_number_of_batches_survive(name: str) -> None:
    state = norm_named(name).read(build(name, batch_norm()))
    assert state.momentum == 0.3
    assert int(state.num_batches_tracked) == 7


@pytest.mark.parametrize("name", [spec.name for spec in specs() if spec.build and not spec.fixed])
def test_gamma_and_beta_stay_the_same_parameters(name: str) -> None:
    bn = batch_norm()
    bn.weight.requires_grad_(False)
    built = build(name, bn)
    assert built.weight is bn.weight
    assert not built.weight.requires_grad
    assert built.bias is bn.bias
    assert built.bias.requires_grad


@pytest.mark.parametrize("name", targets())
@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_the_same(name: str, training: bool) -> None:
    assert build(name, batch_norm().train(training)).training is training


@pytest.mark.parametrize("name", targets())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_kept_and_the_result_is_the_formula_in_that_precision(name: str, dtype: torch.dtype) -> None:
    bn = batch_norm().to(dtype)
    x = torch.randn(SHAPES["2d"]).to(dtype)
    layer = build(name, bn)
    out = outputs(name, layer, x)
    floats = [t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in floats} == {out.dtype} == {dtype}
    assert (
        relative(EXPECTED[name](x, bn), out) < {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    )


@pytest.mark.parametrize("name", targets())
def test_a_layer_on_the_meta_device_stays_there(name: str) -> None:
    layer = build(name, nn.BatchNorm2d(C, device="meta"))
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))


@pytest.mark.parametrize("name", LEAVING_A_NORM)
def test_the_module_says_what_it_is(name: str) -> None:
    assert str(C) in repr(build(name, batch_norm()))


@pytest.mark.parametrize("spec", specs(), ids=lambda s: s.name)
def test_every_norm_is_described(spec: NormSpec) -> None:
    assert spec.title
    assert spec.formula
    assert spec.axes
    assert spec.source


@pytest.mark.parametrize("target", [t for t in CHANNELS_SECOND if t not in BATCH_TYPES])
@pytest.mark.parametrize("source", BATCH_TYPES)
def test_every_batch_type_converts_to_every_other_norm(source: str, target: str) -> None:
    net = conv_bn(C)
    net[1] = build(source, net[1])
    groups = GROUPS if target == "gn" else None
    converted = normswap.convert(net, to=target, groups=groups)
    assert converted._normswap.check.passed
    kind = type(converted[1])
    assert kind is {"fused": nn.Identity}.get(target, type(build(target, batch_norm())))


@pytest.mark.parametrize("target", BATCH_TYPES)
@pytest.mark.parametrize("source", BATCH_TYPES)
def test_batch_types_compute_the_same_in_eval(source: str, target: str) -> None:
    net = conv_bn(C)
    x = torch.randn(2, 3, 6, 6)
    expected = bn_eval(net[1], net[0](x)).relu()
    net[1] = build(source, net[1])
    before = run(net, x)
    after = run(normswap.convert(net, to=target), x)
    assert relative(expected.flatten(), after) < 1e-5
    if {source, target} <= {"bn", "sync"}:
        assert torch.equal(before, after)


def test_fused_equals_torchs_own_fusion() -> None:
    net = conv_bn(C, bias=True)
    fused = normswap.convert(net, to="fused")
    peer = fuse_conv_bn_eval(net[0], net[1])
    torch.testing.assert_close(fused[0].weight, peer.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(fused[0].bias, peer.bias, rtol=1e-6, atol=1e-6)
    assert type(fused[1]) is nn.Identity


def test_fused_without_a_layer_to_go_into_leaves_one_trainable_map() -> None:
    net = randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(C)))
    x = torch.randn(2, C, 4, 4)
    fused = normswap.convert(net, to="fused", example_inputs=x)
    assert isinstance(fused[1], ChannelAffine)
    assert len(list(fused.parameters())) == 2
    assert relative(bn_eval(net[1], x.relu()), fused(x)) < 1e-6


@pytest.mark.parametrize(
    ("source", "target", "groups"), [("gn", "ln", 1), ("ln", "gn", 1), ("gn", "in", C), ("in", "gn", C)]
)
def test_group_norm_with_one_or_all_groups_is_layer_or_instance_norm(source: str, target: str, groups: int) -> None:
    bn = batch_norm()
    x = torch.randn(SHAPES["2d"])
    net = nn.Sequential(nn.ReLU(), nn.GroupNorm(groups, C, eps=3e-3) if source == "gn" else build(source, bn))
    net[1].eps = 3e-3
    randomized(net)
    before = net(x)
    target_groups = groups if target == "gn" else None
    after = normswap.convert(net, to=target, groups=target_groups, example_inputs=x)
    assert type(after[1]) is type(build(target, bn))
    assert relative(before, after(x)) < 1e-5


def test_layer_norm_over_channels_is_torchs_on_the_channels_last_view() -> None:
    bn = batch_norm()
    x = torch.randn(SHAPES["2d"])
    peer = F.layer_norm(x.permute(0, 2, 3, 1), (C,), bn.weight, bn.bias, 1e-5).permute(0, 3, 1, 2)
    torch.testing.assert_close(build("ln-channel", bn)(x), peer, rtol=1e-6, atol=1e-6)


def claimed() -> list[tuple[str, str]]:
    return [(source, spec.name) for spec in specs() for source in exact_from(spec) if spec.name not in BATCH_TYPES]


@pytest.mark.parametrize(("source", "target"), claimed())
def test_a_conversion_that_is_claimed_to_be_exact_is(source: str, target: str) -> None:
    groups = {"gn": GROUPS, "in": C, "adain": C}.get(source)
    second = norm_named(source).channel_dim == 1
    net = randomized(nn.Sequential(nn.Conv2d(3, C, 1) if second else nn.Linear(3, C), build(source, batch_norm())))
    if source not in BATCH_TYPES:
        net[1].eps = 3e-3
    x = torch.randn(2, 3, 4, 4) if second else torch.randn(2, 5, 3)
    converted = normswap.convert(net, to=target, groups=groups if target == "gn" else None, sources=[source])
    assert relative(run(net, x), run(converted, x)) < 1e-5


# --- the registry -----------------------------------------------------------------------------------------------


def _spec(**kwargs: object) -> NormSpec:
    texts = dict.fromkeys(("title", "formula", "axes", "source"), "-")
    return NormSpec(**{"name": "mine", **texts, "read": lambda m: NormState(1, 0.0), **kwargs})


def test_a_name_can_be_registered_once() -> None:
    with pytest.raises(ValueError, match="'gn' is already registered"):
        register(_spec(name="gn"))


def test_a_class_can_be_registered_once() -> None:
    with pytest.raises(ValueError, match="GroupNorm'> is already registered"):
        register(_spec(classes=(nn.GroupNorm,)))


def test_an_unknown_norm_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"unknown norm 'frosen'; known: bn, sync, .*\nDid you mean frozen\?"):
        norm_named("frosen")


@pytest.mark.parametrize(
    ("request_", "groups"),
    [({"groups": 4}, 4), ({"channels_per_group": 16}, 3), ({}, 3), ({"groups": "auto"}, 3), ({"groups": 48}, 48)],
)
def test_the_number_of_groups_of_48_channels(request_: dict[str, object], groups: int) -> None:
    assert norm_named("gn").fit(NormState(48, 1e-5), NormRequest(**request_)).num_groups == groups


@pytest.mark.parametrize(("asked", "nearest"), [(32, 24), (5, 4), (100, 48), (1, 1)])
def test_the_nearest_number_of_groups_is_the_largest_divisor_not_above(asked: int, nearest: int) -> None:
    assert (
        norm_named("gn").fit(NormState(48, 1e-5), NormRequest(groups=asked, indivisible="nearest")).num_groups
        == nearest
    )


@pytest.mark.parametrize(("asked", "groups"), [(10, 6), (100, 1), (16, 3)])
def test_the_nearest_group_size_is_the_largest_divisor_not_above(asked: int, groups: int) -> None:
    request = NormRequest(channels_per_group=asked, indivisible="nearest")
    assert norm_named("gn").fit(NormState(48, 1e-5), request).num_groups == groups


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"groups": 5}, "48 channels do not divide into 5 groups; allowed groups: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        ({"groups": 96}, "48 channels are fewer than 96 groups; allowed groups: 1, 2,"),
        ({"channels_per_group": 9}, "48 channels do not divide by 9 per group; allowed per group: 1, 2, 3,"),
        ({"channels_per_group": 96}, "48 channels are fewer than 96 per group; allowed per group: 1, 2,"),
    ],
)
def test_a_number_that_does_not_divide_names_those_that_do(request_: dict[str, int], said: str) -> None:
    with pytest.raises(DoesNotFit, match=said):
        norm_named("gn").fit(NormState(48, 1e-5), NormRequest(**request_))


def test_groups_chosen_automatically_are_near_sixteen_channels_and_always_divide() -> None:
    for channels in range(1, 200):
        groups = norm_named("gn").fit(NormState(channels, 1e-5), NormRequest(groups="auto")).num_groups
        assert channels % groups == 0
    sizes = {
        c: c // norm_named("gn").fit(NormState(c, 1e-5), NormRequest()).num_groups
        for c in (16, 32, 64, 24, 88, 7, 2048)
    }
    assert sizes == {16: 16, 32: 16, 64: 16, 24: 12, 88: 22, 7: 7, 2048: 16}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("name", "shape"), [(n, s) for n, s in cases() if n != "sync"])
def test_gradients_are_those_of_finite_differences(name: str, shape: str, training: bool) -> None:
    """Of input, gamma and beta. SyncBatchNorm trains on GPUs only; in eval mode it is BN's formula."""
    norm = build(name, batch_norm(DIMS[shape])).double().train(training)
    x = torch.randn(SHAPES[shape], dtype=torch.float64).movedim(1, norm_named(name).channel_dim).requires_grad_()
    parameters = {k: p.detach().clone().requires_grad_() for k, p in norm.named_parameters()}

    def formula(x: Tensor, *values: Tensor) -> Tensor:
        buffers = {k: b.clone() for k, b in norm.named_buffers()}  # running statistics move in training
        return torch.func.functional_call(norm, dict(zip(parameters, values, strict=True)) | buffers, (x,))

    assert torch.autograd.gradcheck(formula, (x, *parameters.values()), fast_mode=True)
