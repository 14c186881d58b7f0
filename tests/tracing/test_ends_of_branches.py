"""Which norm is the last of a residual branch."""

from __future__ import annotations

import pytest
import torch
from helpers import MODES, Residual, X, conv_bn
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.inspection.inventory import inspect


def last_norms(net: nn.Module, x: Tensor | None = None) -> list[str]:
    return [layer.path for layer in inspect(net.eval(), x).layers if layer.feed.last_of_branch]


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_the_last_norm_of_every_residual_branch_is_found(name: str, last: str) -> None:
    models = pytest.importorskip("torchvision.models")
    net = models.get_model(name, weights=None)
    expected = [path for path, _ in net.named_modules() if path.startswith("layer") and path.endswith(last)]
    assert last_norms(net) == expected
    assert last_norms(net, torch.randn(1, 3, 64, 64)) == expected


def test_the_last_norm_of_inverted_residuals_is_found_where_there_is_a_shortcut() -> None:
    models = pytest.importorskip("torchvision.models")
    net = models.mobilenet_v2(weights=None)
    blocks = [(path, m) for path, m in net.named_modules() if getattr(m, "use_res_connect", False)]
    assert last_norms(net) == [f"{path}.conv.3" for path, _ in blocks]


def test_a_norm_on_the_shortcut_is_not_the_last_of_the_branch() -> None:
    class Projected(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.bn1(self.conv1(x)))
            return self.down(x) + self.bn2(self.conv2(y))

    class PooledProjected(Projected):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.bn1(self.conv1(x)))
            return self.down(F.avg_pool2d(x, 1)) + self.bn2(self.conv2(y))

    x = torch.randn(1, 4, 8, 8)
    for net in (Residual(), Projected(), PooledProjected()):
        assert last_norms(net) == last_norms(net, x) == ["bn2"]


def test_a_norm_whose_output_is_used_elsewhere_is_not_the_last() -> None:
    class Shared(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
            return y + x, y

    assert last_norms(Shared()) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stem", [nn.Identity(), nn.Conv2d(4, 4, 1)])
def test_a_norm_beside_its_own_input_is_not_the_last_of_a_branch(stem: nn.Module, mode: str) -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn = stem, nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.bn(x)

    assert last_norms(Empty(), torch.randn(1, 4, 8, 8) if mode == "recorded" else None) == []


@pytest.mark.parametrize("mode", MODES)
def test_of_two_branches_of_equal_depth_neither_is_the_shortcut_of_the_other(mode: str) -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(4)[:2], conv_bn(4)[:2]

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    assert last_norms(Parallel(), X if mode == "recorded" else None) == []


def test_a_norm_before_a_plain_sum_is_not_the_last_of_a_branch() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(4), conv_bn(4)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.a[1](self.a[0](x)) + self.b[0](z)

    assert last_norms(Sum()) == []
