"""Undoing a conversion: bit for bit where that is possible, and a clear word where it is not."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers import Net, Residual, bits, classes, contents, conv_bn, randomized, relative, run
from torch import Tensor, nn

import normswap
from normswap.conversion.exact_scaling import fold_exactly, unfold
from normswap.conversion.history import Calibrated
from normswap.errors import RevertError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


class Everything(nn.Module):
    """Norms after convolutions with and without bias, transposed, grouped, linear, after a sum, and without gamma."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv_bn(8)
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2, bias=True), nn.BatchNorm2d(8, affine=False))
        self.c = nn.Sequential(nn.ConvTranspose2d(8, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8))
        self.pre = nn.BatchNorm2d(8)
        self.d = nn.Sequential(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6))
        self.frozen = randomized(nn.BatchNorm1d(6, momentum=0.3)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.pre(self.c(self.b(y)) + y)
        return self.frozen(self.d(y.mean((2, 3))).relu())


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    net = randomized(Everything()).to(dtype)
    net.b.eval()
    net.a.train()
    return net


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"to": "gn", "groups": 2},
        {"to": "ln", "eps": 1.0},
        {"to": "ln-channel", "transfer": "copy"},
        {"to": "gn", "groups": 2, "transfer": "reset"},
        {"to": "fused"},
        {"to": "frozen"},
        {"to": "sync"},
        {"to": "renorm"},
        {"to": "bn", "transfer": "reset"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_reverted_network_is_the_original_bit_for_bit(
    options: dict[str, Any], dtype: torch.dtype, inplace: bool
) -> None:
    net = network(dtype)
    before, modules = contents(net), classes(net)
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in net.modules()]
    parameters = dict(net.named_parameters())
    norms = {name: m for name, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    converted = normswap.convert(net, inplace=inplace, check=False, **options)
    assert contents(converted) != before or options["to"] in ("sync",)
    reverted = normswap.revert(converted)
    assert contents(reverted) == before
    assert classes(reverted) == modules
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in reverted.modules()] == flags
    assert not hasattr(reverted, "_normswap")
    if inplace:
        assert reverted is net
        assert all(dict(reverted.named_modules())[name] is m for name, m in norms.items())
        assert all(dict(reverted.named_parameters())[name] is p for name, p in parameters.items())
    else:
        assert contents(net) == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_at_the_edges_of_a_dtype_come_back(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    net = conv_bn(8, bias=True).to(dtype)
    with torch.no_grad():
        flat = net[0].weight.view(-1)
        edges = [0.0, -0.0, info.tiny, -info.tiny, info.smallest_normal / 4, info.eps, 1.0, -1.0]
        flat[: len(edges)] = torch.tensor(edges, dtype=torch.float64).to(dtype)
        flat[8:10] = info.max if dtype is not torch.float16 else 1000.0
        net[0].bias[0] = info.tiny
    before = contents(net)
    reverted = normswap.revert(normswap.convert(net, to="ln", check=False))
    assert contents(reverted) == before


def test_weights_that_are_not_finite_come_back() -> None:
    net = conv_bn(8, bias=True)
    with torch.no_grad():
        net[0].weight.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    before = contents(net)
    assert contents(normswap.revert(normswap.convert(net, to="ln", check=False))) == before


INTEGERS = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float64: torch.int64,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 3, 3), (1, 1), (7, 3, 5), (300, 40, 3, 3)])
def test_two_bits_an_element_undo_a_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    original = weight.clone()
    factor = (torch.rand(shape[0]) + 0.5).view(-1, *[1] * (len(shape) - 1))
    factor = factor.double() if dtype is torch.float64 else factor
    packed = fold_exactly(weight, factor)
    assert packed is not None
    assert bits(weight) == bits((original.to(factor.dtype) * factor).to(dtype))
    assert packed.dtype is torch.uint8
    assert packed.numel() == -(-weight.numel() // 4)
    assert bits(unfold(packed, weight, factor)) == bits(original)


def awkward(shape: tuple[int, ...], dtype: torch.dtype, where: str) -> tuple[Tensor, Tensor]:
    """Weights, some of them any bits at all, and factors of any size and sign."""
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    info = torch.iinfo(INTEGERS[dtype])
    anything = torch.randint(info.min, info.max, shape, dtype=INTEGERS[dtype]).view(dtype)
    if where == "everywhere":
        weight = torch.where(torch.rand(shape) < 0.05, anything, weight)
    else:
        weight[-1] = anything[-1]
    factor = torch.randn(shape[0]).mul(2 if where == "last" else 20).exp() * torch.randn(shape[0]).sign()
    return weight, (factor.double() if dtype is torch.float64 else factor).view(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["everywhere", "last"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_weight_is_folded_whole_and_comes_back_or_stays_as_it_was(
    dtype: torch.dtype, where: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("normswap.conversion.exact_scaling._BLOCK", 32)
    for shape in [(1, 3, 1, 1), (9, 2, 3, 3), (40, 5, 1, 2)] * 4:
        weight, factor = awkward(shape, dtype, where)
        if channels_last:
            weight = weight.contiguous(memory_format=torch.channels_last)
        original = weight.clone()
        packed = fold_exactly(weight, factor)
        assert bits(weight if packed is None else unfold(packed, weight, factor)) == bits(original)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_weight_that_cannot_be_undone_leaves_all_blocks_as_they_were(dtype: torch.dtype) -> None:
    weight = torch.randn(600, 300, dtype=torch.float64).to(dtype)  # three blocks of some 200 rows
    weight[599, 299] = 1.4 * torch.finfo(dtype).smallest_normal  # 1e-3 of it has few digits left, or none
    factor = torch.full((600, 1), 1e-3, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    original = weight.clone()
    assert fold_exactly(weight, factor) is None
    assert bits(weight) == bits(original)


def test_undo_takes_little_beside_the_folded_weights() -> None:
    net = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64))
    record = normswap.convert(randomized(net), to="ln", check=False)._normswap
    (layer,) = record.undo.layers
    assert layer.weight is None
    assert layer.correction.numel() * 16 == net[0].weight.numel() * 4


# --- after the network lived on ---------------------------------------------------------------------------------


def trained(net: nn.Module, *names: str) -> nn.Module:
    with torch.no_grad():
        for name in names:
            net.get_parameter(name).add_(0.01)
    return net


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias"])
def test_after_training_strict_says_so_and_changes_nothing(name: str) -> None:
    converted = trained(normswap.convert(conv_bn(8), to="ln"), name)
    before = contents(converted)
    with pytest.raises(
        RevertError, match=rf"(?s)1 layer changed since the conversion.*the first is {name[0]}.*strict=False"
    ):
        normswap.revert(converted)
    assert contents(converted) == before
    assert converted._normswap is not None


def test_moved_statistics_of_a_batch_norm_target_count_as_changed() -> None:
    converted = normswap.convert(conv_bn(8), to="renorm").train()
    converted(torch.randn(4, 3, 5, 5))
    with pytest.raises(RevertError, match="changed since the conversion"):
        normswap.revert(converted)


def test_training_elsewhere_does_not_stand_in_the_way() -> None:
    net = nn.Sequential(conv_bn(8), nn.Conv2d(8, 2, 1))
    converted = trained(normswap.convert(net, to="ln"), "1.weight")
    reverted = normswap.revert(converted)
    assert contents(reverted[0]) == contents(net[0])
    torch.testing.assert_close(reverted[1].weight, net[1].weight + 0.01)


def test_without_strict_a_trained_network_keeps_what_it_learned_in_its_layers() -> None:
    net = conv_bn(8, bias=True)
    converted = normswap.convert(net, to="ln")
    scale = (net[1].running_var + net[1].eps).rsqrt().view(-1, 1, 1, 1)
    with torch.no_grad():
        converted[0].weight.add_(scale * 0.5)  # as if the original weight had grown by one half
    reverted = normswap.revert(converted, strict=False)
    assert classes(reverted) == classes(net)
    torch.testing.assert_close(reverted[0].weight, net[0].weight + 0.5)
    torch.testing.assert_close(reverted[0].bias, net[0].bias)
    assert contents(reverted[1]) == contents(net[1])


def test_after_calibration_the_norms_may_differ_and_the_original_comes_back() -> None:
    net = conv_bn(8)
    before = contents(net)
    converted = trained(normswap.convert(net, to="ln"), "1.weight", "1.bias")
    converted._normswap.history.append(Calibrated())
    assert contents(normswap.revert(converted)) == before


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_that_of_the_network_now(training: bool) -> None:
    converted = normswap.convert(conv_bn(8).train(not training), to="ln").train(training)
    assert {m.training for m in normswap.revert(converted).modules()} == {training}


def test_hooks_put_on_the_converted_norm_stay() -> None:
    converted = normswap.convert(conv_bn(8), to="ln")
    calls: list[int] = []
    handle = converted[1].register_forward_hook(lambda *a: calls.append(1))
    reverted = normswap.revert(converted)
    x = torch.randn(1, 3, 5, 5)
    reverted(x)
    assert calls == [1]
    handle.remove()
    reverted(x)
    assert calls == [1]


@pytest.mark.parametrize("net", [conv_bn(8), nn.Sequential(nn.ReLU(), conv_bn(8)[1])], ids=["folded", "prescaled"])
def test_a_network_in_another_dtype_cannot_come_back_bit_for_bit(net: nn.Module) -> None:
    converted = normswap.convert(net, to="ln").half()
    with pytest.raises(RevertError, match="changed since the conversion"):
        normswap.revert(converted)
    reverted = normswap.revert(converted, strict=False)
    assert {p.dtype for p in reverted.parameters()} == {torch.float16}


def test_a_layer_that_is_gone_is_named() -> None:
    net = nn.Sequential(conv_bn(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    converted = normswap.convert(randomized(net), to="ln")
    del converted[2], converted[1]
    before = contents(converted)
    with pytest.raises(RevertError, match=r"no longer has all layers that were changed; the first of 2 is 1"):
        normswap.revert(converted)
    assert contents(converted) == before


def test_a_replaced_layer_counts_as_changed() -> None:
    converted = normswap.convert(conv_bn(8), to="ln")
    converted[0] = nn.Conv2d(3, 8, 3, bias=False)
    with pytest.raises(RevertError, match="changed since the conversion"):
        normswap.revert(converted)


# --- where there is nothing to undo -------------------------------------------------------------------------------


def test_a_network_that_was_never_converted_is_an_error() -> None:
    with pytest.raises(RevertError, match="nothing to revert"):
        normswap.revert(Net())


def test_a_conversion_without_undo_says_so() -> None:
    converted = normswap.convert(conv_bn(8), to="ln", undo=False)
    assert converted._normswap.check.passed
    with pytest.raises(RevertError, match=r"kept nothing to undo it with.*\n.*from its source"):
        normswap.revert(converted)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_was_converted_twice_is_reverted_step_by_step(inplace: bool) -> None:
    net = nn.Sequential(conv_bn(8), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4))
    original = contents(randomized(net))
    once = normswap.convert(net, rules={"0": "gn"}, groups=2)
    between = contents(once)
    twice = normswap.convert(once, rules={"2": "ln"}, inplace=inplace)
    assert classes(twice).count("GroupNorm") == 2
    reverted = normswap.revert(twice)
    assert contents(reverted) == between
    assert contents(normswap.revert(reverted)) == original


def test_reverting_twice_is_an_error() -> None:
    reverted = normswap.revert(normswap.convert(conv_bn(8), to="ln"))
    with pytest.raises(RevertError, match="nothing to revert"):
        normswap.revert(reverted)


# --- what else must survive ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("journey", ["deepcopy", "pickle"])
def test_a_copied_network_can_be_reverted(journey: str) -> None:
    net = randomized(Residual())
    before = contents(net)
    converted = normswap.convert(net, to="gn", groups=2)
    if journey == "deepcopy":
        twin = copy.deepcopy(converted)
    else:
        file = io.BytesIO()
        torch.save(converted, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert contents(normswap.revert(twin)) == before
    assert "GroupNorm" in classes(converted)  # the copy's undo is its own
    assert contents(normswap.revert(converted)) == before


def test_an_optimizer_on_the_original_parameters_still_steps_after_an_in_place_round_trip() -> None:
    net = conv_bn(8, bias=True).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    normswap.revert(normswap.convert(net, to="ln", inplace=True))
    before = contents(net)
    net(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    after = contents(net)
    assert all(before[name] != after[name] for name, _ in net.named_parameters())


def test_the_reverted_network_computes_what_the_original_did() -> None:
    net = network().eval()
    x = torch.randn(2, 3, 9, 9)
    expected = run(net, x)
    assert torch.equal(run(normswap.revert(normswap.convert(net, to="gn", groups=2)), x), expected)
    assert relative(expected, run(normswap.convert(net, to="gn", groups=2), x)) > 1e-3  # it did differ


def test_a_root_that_is_a_norm_comes_back() -> None:
    bn = randomized(nn.BatchNorm2d(4))
    converted = normswap.convert(bn, to="gn", groups=2, inplace=True)
    assert converted is not bn
    assert normswap.revert(converted) is bn
    assert not hasattr(bn, "_normswap")


def test_every_name_of_a_shared_norm_comes_back() -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__()
            self.also = nn.ModuleList([self.bn])
            self.again = self.bn

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.conv(x))

    net = randomized(Shared())
    bn = net.bn
    normswap.revert(normswap.convert(net, to="ln", inplace=True))
    assert net.bn is net.again is net.also[0] is bn
