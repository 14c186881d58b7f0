"""What the self-check proves, and what it does not hold against a network."""

from __future__ import annotations

import pytest
import torch
from detectors import worn
from helpers import Net, Residual, X, conv_bn, randomized
from memory import Wasteful, peak
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection as zoo

import normswap
from normswap.selfcheck import Check, observe


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_half_precision_is_proven_in_double(dtype: torch.dtype, inplace: bool) -> None:
    net = randomized(Residual()).to(dtype)
    converted = normswap.convert(net, to="gn", groups=2, eps=1.0, zero_init_residual=True, inplace=inplace)
    assert converted._normswap.check.error < 1e-10
    assert {p.dtype for p in converted.parameters()} == {dtype}


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
