"""ChannelLayerNorm, against torch on the channels-last view and against torchvision's and timm's `LayerNorm2d`."""

from __future__ import annotations

import pytest
import torch
from helpers import randomized
from torch import nn
from torchvision.models.convnext import LayerNorm2d

from normswap.norms.layer import ChannelLayerNorm
from normswap.norms.registry import identify


def filled(channels: int = 6) -> ChannelLayerNorm:
    norm = ChannelLayerNorm(channels, eps=1e-3)
    with torch.no_grad():
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (2, 6, 3, 4), (2, 6, 2, 3, 4)])
def test_it_is_layer_norm_on_the_channels_last_view_in_any_dimension(shape: tuple[int, ...]) -> None:
    norm = filled()
    peer = nn.LayerNorm(6, eps=1e-3)
    peer.load_state_dict(norm.state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(norm(x), peer(x.movedim(1, -1)).movedim(-1, 1))


def test_it_loads_torchvisions_weights_and_computes_the_same() -> None:
    peer = randomized(LayerNorm2d(6, eps=1e-3))
    norm = ChannelLayerNorm(6, eps=1e-3)
    norm.load_state_dict(peer.state_dict())
    x = torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(norm(x), peer(x))


def test_its_gradients_are_right() -> None:
    norm = filled().double()
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, b: torch.func.functional_call(norm, {"weight": w, "bias": b}, x),
                                    (x, norm.weight, norm.bias))  # fmt: skip


def test_without_affine_it_has_no_parameters() -> None:
    norm = ChannelLayerNorm(6, affine=False)
    assert not list(norm.parameters())
    y = norm(torch.randn(2, 6, 3))
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3), rtol=0, atol=1e-6)


def test_torchvisions_and_timms_layers_are_recognised() -> None:
    timm = pytest.importorskip("timm.layers")
    assert identify(LayerNorm2d(4)).name == "ln-channel"
    assert identify(timm.LayerNorm2d(4)).name == "ln-channel"
    assert identify(timm.LayerNormAct2d(4)).name == "ln-channel"
    assert identify(nn.LayerNorm(4)).name == "ln"
