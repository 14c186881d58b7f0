"""RMSNorm over the channels of each position, against a formula in float64 and against timm's `RmsNorm2d`."""

from __future__ import annotations

import timm
import torch
from helpers import broadcast, relative
from torch import Tensor, nn

import normswap
from normswap.norms.registry import identify
from normswap.norms.rms_channel import ChannelRMSNorm


def by_hand(x: Tensor, bn: nn.Module, eps: float = 1e-5) -> Tensor:
    """What the layer built with a batch norm's gamma and beta computes of `(N, C, *)`, in float64."""
    wide = x.double()
    y = wide / ((wide**2).sum(1, keepdim=True) / wide.shape[1] + eps) ** 0.5
    y = y if bn.weight is None else y * broadcast(bn.weight.double(), x)
    return y if bn.bias is None else y + broadcast(bn.bias.double(), x)


EXPECTED = {"rms-channel": by_hand}


def network() -> nn.Module:
    norm = timm.layers.RmsNorm2d(8, eps=1e-3)
    nn.init.normal_(norm.weight)
    return nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU()).eval()


def test_timm_s_is_read_and_converted_to_itself_exactly() -> None:
    net, x = network(), torch.randn(2, 3, 5, 5)
    layer = normswap.inspect(net)["1"]
    assert (layer.spec.name, layer.state.channels, layer.state.eps) == ("rms-channel", 8, 1e-3)
    made = normswap.convert(net, "rms-channel")
    assert type(made[1]) is ChannelRMSNorm
    assert relative(net(x), made(x)) < 1e-6


def test_what_is_built_is_itself_and_not_the_norm_of_the_last_dimension() -> None:
    assert identify(ChannelRMSNorm(4)).name == "rms-channel"
    assert identify(nn.RMSNorm(4)).name == "rms"


def test_it_becomes_a_fixed_map_with_images() -> None:
    net, x = network(), torch.randn(16, 3, 5, 5)
    made = normswap.convert(net, "fused", missing_statistics="later")
    report = normswap.calibrate(made, net, x)
    assert report.drift_after < 0.5
    assert not any(isinstance(m, ChannelRMSNorm) for m in made.modules())
