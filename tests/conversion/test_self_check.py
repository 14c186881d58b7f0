"""What the self-check proves, and what it does not hold against a network."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from detectors import worn
from helpers import Net, Residual, X, conv_bn, fingerprint, randomized
from memory import Wasteful, peak
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection as zoo

import normswap
from normswap.conversion.self_check import Check, Observations, compare, observe, watched_paths
from normswap.errors import SelfCheckError


class Sampling(Net):
    """Dropout that stays on in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, training=True)


class Dictionary(Net):
    def forward(self, x: Tensor) -> dict[str, object]:
        y = super().forward(x)
        return {"out": y, "all": [y, (y.relu(), None)], "shape": y.shape}


class InPlace(Net):
    """Changes what its norm returned."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        y.mul_(0.0)
        return y


class Exploding(Net):
    """Overflows on any input, as deep networks with random weights may."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double().mul(1e300).mul(1e300).float().nan_to_num(0.0, 1.0, -1.0) + super().forward(x)


class Deep(nn.Module):
    """Forty pairs: rounding has room to grow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(8)
        self.body = nn.Sequential(
            *(layer for _ in range(40) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


@pytest.mark.parametrize("net", [Sampling, Dictionary, InPlace, Exploding, Deep, Residual])
@pytest.mark.parametrize("to", ["ln", "fused"])
def test_a_right_conversion_passes(net: type[nn.Module], to: str) -> None:
    check = normswap.convert(randomized(net()), to=to)._normswap.check
    assert check.passed
    assert check.error <= 1e-4
    assert check.layers == check.total


class FromPython(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random()


class FromNumPy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(np.random.rand())  # noqa: NPY002


class OwnSource(Net):
    """Takes random numbers where nobody can seed them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.SystemRandom().random()


@pytest.mark.parametrize("net", [Sampling, FromPython, FromNumPy])
def test_a_forward_that_takes_random_numbers_is_checked_and_their_states_stay(net: type[nn.Module]) -> None:
    models = [randomized(net()), randomized(net())]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert all(normswap.convert(model, to="ln")._normswap.check.passed for model in models)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("inplace", [False, True])
def test_a_forward_that_is_never_the_same_is_named_as_the_reason(inplace: bool) -> None:
    net = randomized(OwnSource())
    before = fingerprint(net)
    with pytest.raises(SelfCheckError, match="OwnSource itself gives another output each time") as caught:
        normswap.convert(net, to="ln", inplace=inplace)
    assert "report" not in caught.value.hint
    assert fingerprint(net) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_half_precision_is_proven_in_double(dtype: torch.dtype, inplace: bool) -> None:
    net = randomized(Residual()).to(dtype)
    converted = normswap.convert(net, to="gn", groups=2, eps=1.0, zero_init_residual=True, inplace=inplace)
    assert converted._normswap.check.error < 1e-10
    assert {p.dtype for p in converted.parameters()} == {dtype}


class Branches(nn.Module):
    """Two branches of a convolution and a norm each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(4), conv_bn(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def compared(damage: float | None, before: float | None = None, net: nn.Module | None = None) -> Check:
    """A network of two branches and its conversion, with a value put into a bias of the result and of the original."""
    net = net or randomized(Branches())
    if before is not None:
        net.a[1].bias.data[0] = before
    made = normswap.plan(net, "ln")
    reference: Observations = observe(net, (X,), watched_paths(net, made))
    converted = normswap.convert(net, using=made, check=False)
    if damage is not None:
        converted.a[1].bias.data[0] = damage
    return compare(converted, made, (X,), reference, {})


def test_comparing_gives_the_largest_relative_error_and_its_layer() -> None:
    assert compared(None).error < 1e-6
    net = randomized(Branches())
    check = compared(5.0, net=net)
    expected = net.a[:2](X).detach()
    wrong = expected.clone()
    wrong[:, 0] += 5.0 - net.a[1].bias[0].detach()
    assert check.error == pytest.approx(float((wrong - expected).norm() / expected.norm()), rel=1e-5)
    assert (check.where, check.layers, check.total) == ("a.1", 2, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_fails_whatever_layer_comes_after_it(value: float) -> None:
    check = compared(value)
    assert not check.passed
    assert check.error == float("inf")
    assert check.where == "a.1"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_the_original_has_that_is_not_finite_is_left_out_where_both_have_it(value: float) -> None:
    assert compared(None, before=value).passed
    assert not compared(1.0, before=value).passed
    if value == value:
        assert not compared(-value, before=value).passed


def test_an_original_of_nothing_but_nan_proves_nothing() -> None:
    class Undefined(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * float("nan"))

    with pytest.raises(SelfCheckError, match="the original itself gives nothing but NaN and Inf there"):
        normswap.convert(randomized(Undefined()), to="ln")


def test_a_folded_weight_that_is_nan_stops_the_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*args: object, **kwargs: object) -> object:
        record = scale_layer(*args, **kwargs)
        if args[1] == "a.0":
            args[0].weight.data[0] = float("nan")
        return record

    scale_layer = normswap.conversion.apply.scale_layer
    monkeypatch.setattr(normswap.conversion.apply, "scale_layer", damaged)
    with pytest.raises(SelfCheckError, match=r"a\.1: the converted network gives NaN, Inf"):
        normswap.convert(randomized(Branches()), to="gn", groups=2)


def test_observing_takes_the_values_before_what_follows_changes_them() -> None:
    net = randomized(InPlace())
    seen = observe(net, (X,), ["bn"])
    expected = net.bn(net.conv(X)).detach().reshape(-1)
    assert torch.equal(seen["bn"][0].float(), expected)
    assert not bool(seen["(output)"][0].any())


def test_layers_that_the_input_does_not_reach_are_counted_out() -> None:
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.BatchNorm2d(4)

    check = normswap.convert(randomized(Spare()), to="ln")._normswap.check
    assert (check.layers, check.total) == (1, 2)


@pytest.mark.parametrize(
    ("error", "passed"), [(None, False), (0.0, True), (1e-4, True), (2e-4, False), (float("nan"), False)]
)
def test_only_a_run_within_tolerance_has_passed(error: float | None, passed: bool) -> None:
    assert Check(error).passed is passed


def test_detectors_are_checked_on_small_images_and_keep_their_own_sizes() -> None:
    model = worn(zoo.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None))
    sides: list[int] = []
    handle = model.backbone.register_forward_hook(lambda module, args, out: sides.append(max(args[0].shape[2:])))
    converted = normswap.convert(model, "gn")
    handle.remove()
    assert sides
    assert max(sides) <= 320
    for each in (model, converted):
        assert (tuple(each.transform.min_size), each.transform.max_size) == ((800,), 1333)


def test_the_self_check_holds_little_more_than_a_plain_run() -> None:
    model, x = Wasteful().eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        plain = peak(lambda: model(x))
    weights = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    assert peak(lambda: normswap.convert(model, "gn", groups=2, example_inputs=x)) < 1.2 * plain + 4 * weights


def test_samples_are_copies_evenly_spread() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mul_(2)

    x = torch.arange(20000.0, dtype=torch.float64)
    seen = observe(Twice(), (x.clone(),), ["layer"])
    assert torch.equal(seen["layer"][0], x[::5])
    images = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert torch.equal(observe(nn.Identity(), (images,), [])["(output)"][0], images.flatten())
