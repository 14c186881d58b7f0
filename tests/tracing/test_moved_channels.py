"""Linear layers whose channels, the last dimension, are moved whole to where a BatchNorm1d has its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import MODES, bits, bn_eval, contents, edges, grouped, randomized, run
from torch import Tensor, nn

import normswap
from normswap.tracing.moves import was_move

Shape = Callable[[Tensor], Tensor]


class Moved(nn.Module):
    """What a linear layer makes, moved, and normalized."""

    def __init__(self, move: Shape, channels: int = 6, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.fc, self.move = nn.Linear(5, 6), move
        self.bn = nn.BatchNorm1d(channels) if norm is None else norm
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.move(self.fc(x)))


X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))

WHOLE: dict[str, Shape] = {
    "transpose(1, 2)": lambda y: y.transpose(1, 2),
    "transpose(-1, 1)": lambda y: y.transpose(-1, 1),
    "torch.transpose": lambda y: torch.transpose(y, 2, 1),
    "permute": lambda y: y.permute(0, 2, 1),
    "reshape": lambda y: y.reshape(-1, 6),
    "view": lambda y: y.view(12, 6),
    "reshape by its size": lambda y: y.reshape(-1, y.size(-1)),
    "view by its shape": lambda y: y.view(y.shape[0] * y.shape[1], y.shape[2]),
    "flatten": lambda y: y.flatten(0, -2),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("move", WHOLE)
def test_a_linear_layer_whose_channels_are_moved_whole_is_found(move: str, mode: str) -> None:
    assert edges(Moved(WHOLE[move]), mode, X) == {"bn": ("fc",)}


@pytest.mark.parametrize("move", WHOLE)
@torch.no_grad()
def test_folded_into_it_computes_group_norm_of_standardised_channels(move: str) -> None:
    net = Moved(WHOLE[move])
    before, wanted = contents(net), bn_eval(net.bn, net.move(net.fc(X)))
    fused = normswap.convert(net, "fused", example_inputs=X)
    assert type(fused.bn) is nn.Identity
    torch.testing.assert_close(fused(X).double(), wanted, rtol=1e-4, atol=1e-5)
    model = normswap.convert(net, "gn", groups=2, example_inputs=X)
    plain = (wanted - net.bn.bias.double().view(1, -1, *[1] * (wanted.dim() - 2))) / net.bn.weight.double().view(
        1, -1, *[1] * (wanted.dim() - 2)
    )
    expected = grouped(plain, 2, model.bn.eps, net.bn.weight, net.bn.bias)
    torch.testing.assert_close(model(X).double(), expected, rtol=1e-4, atol=1e-5)
    assert contents(normswap.revert(model)) == before


@pytest.mark.parametrize("method", ["moments", "balance", "refit"])
@pytest.mark.parametrize("move", WHOLE)
@torch.no_grad()
def test_calibrated_it_has_the_moments_of_the_original_and_can_be_undone(move: str, method: str) -> None:
    x = torch.randn(12, 6, 5) if move != "view" else X  # as many steps as channels: shapes tell nothing
    net = Moved(WHOLE[move])
    model = normswap.convert(net, "gn", groups=2, example_inputs=x)
    normswap.calibrate(model, net, x, method=method, batch_size=12)
    wanted, found = bn_eval(net.bn, net.move(net.fc(x))), model(x).double()
    over = (0, 2) if wanted.dim() == 3 else (0,)
    for reduce in (torch.mean, torch.std):
        torch.testing.assert_close(reduce(found, over), reduce(wanted, over), rtol=1e-3, atol=1e-3)
    normswap.revert(model)
    assert bits(run(model, x)) == bits(run(net, x))


OTHERWISE: dict[str, tuple[Shape, int]] = {  # with the norm's channels
    "as it is": (lambda y: y, 3),
    "split": (lambda y: y.reshape(4, 3, 2, 3).flatten(1, 2).transpose(1, 2), 3),
    "split in rows": (lambda y: y.reshape(-1, 3), 3),
    "split by another's size": (lambda y: y.reshape(-1, y.transpose(1, 2).shape[-1]), 3),
    "split by another size": (lambda y: y.reshape(-1, y.shape[1]), 3),
    "merged": (lambda y: y.reshape(4, 18), 18),
    "scrambled": (lambda y: y.reshape(4, 6, 3), 6),
    "of two": (lambda y: y.transpose(1, 2).reshape(4, 6, 3).flip(1), 6),
    "the first with the second": (lambda y: y.transpose(0, 1), 4),
    "transposed twice": (lambda y: y.transpose(1, 2).transpose(1, 2), 3),
    "flattened to the second": (lambda y: y.flatten(0, 1), 6),
    "by negative dimensions alone": (lambda y: y.transpose(-1, -2), 6),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("move", OTHERWISE)
def test_a_linear_layer_whose_channels_may_go_elsewhere_is_not_claimed(move: str, mode: str) -> None:
    shape, channels = OTHERWISE[move]
    net = Moved(shape, channels)
    net(X)
    assert edges(net, mode, X) == {}


class ReadMoved(Moved):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).transpose(1, 2)
        return self.bn(y) + y


class ReadBefore(Moved):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.bn(y.transpose(1, 2)) + y.transpose(1, 2)


class ChangedInPlace(Moved):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).transpose(1, 2)
        y.mul_(2)
        return self.bn(y)


class NotOnAllWays(Moved):
    skip = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.bn(y if self.skip else y.transpose(1, 2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [ReadMoved, ReadBefore, ChangedInPlace, NotOnAllWays])
def test_a_linear_layer_is_not_claimed_where_what_is_moved_has_other_uses(case: type[Moved], mode: str) -> None:
    assert edges(case(torch.relu), mode, X) == {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", [nn.SyncBatchNorm(6), nn.GroupNorm(2, 6)])
def test_a_norm_that_takes_more_dimensions_is_not_fed_by_what_is_moved(norm: nn.Module, mode: str) -> None:
    assert edges(Moved(WHOLE["transpose(1, 2)"], norm=norm), mode, X) == {}


@pytest.mark.parametrize("mode", MODES)
def test_the_channels_of_a_convolution_are_not_those_that_are_moved(mode: str) -> None:
    net = Moved(WHOLE["transpose(1, 2)"])
    net.fc = nn.Conv1d(3, 6, 1)
    assert edges(net, mode, torch.randn(2, 3, 6)) == {}


FOUR = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("transpose", (FOUR, 1, -1), True),
        ("transpose", (FOUR[0], -1, -2), True),
        ("transpose", (FOUR, 1, 2), False),
        ("transpose", (FOUR[0], 0, 1), False),
        ("permute", (FOUR[0], [0, -1, 1]), True),
        ("permute", (FOUR[0], [2, 0, 1]), False),
        ("permute", (FOUR, [0, 2, 1, 3]), False),
        ("view", (FOUR, [24, 5]), True),
        ("view", (FOUR, [6, 5, 4]), False),
        ("mul", (FOUR, 2), False),
    ],
)
def test_an_operation_on_what_a_run_gives_it_is_a_move_where_the_last_dimension_comes_second(
    name: str, args: tuple, expected: bool
) -> None:
    assert was_move(name, args, getattr(FOUR.__class__, name)(*args)) is expected
