"""Forwards that do not trace: a recorded run, on inputs given or guessed, settles what the code it ran can do."""

from __future__ import annotations

import dis
import sys

import pytest
import torch
from helpers import MODES, Net, X, edges, fingerprint, needs_known_instructions, randomized
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.tracing.followed import variables_read


def size_of(x: Tensor) -> int:
    """A number out of a shape: no symbolic run gets past it."""
    return int(x.shape[-1])


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y if size_of(y) > 1 else y.mean()


class OneVariable(Net):
    """A variable holds the convolution's output, and then the norm's, which the other way reads."""

    activation: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        size_of(x)
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        if self.activation is not None:
            x = self.activation(x)
        if x.shape[1] != 4:
            raise ValueError(f"{self.conv}: {x.shape}")
        return x


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        xs = [x, x * 2][: size_of(x)]
        return sum(branch(x) for branch, x in zip(self.branches, xs, strict=True))


class HandsOver(nn.Module):
    """A block goes through a function that looks at it."""

    def __init__(self, look: object = len) -> None:
        super().__init__()
        self.block, self.look = Net(), look

    def forward(self, x: Tensor) -> Tensor:
        size_of(x)
        register(self.block)
        return self.block(x)


def register(block: nn.Module) -> None:
    type(block).__name__.lower()


class TrainsElsewhere(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.MSELoss()

    def loss_of(self, y: Tensor, target: Tensor) -> Tensor:
        return self.loss(y, target)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        if target is not None:
            return self.loss_of(y, target)
        return y


SETTLED = {
    Plain: {"bn": ("conv",)},
    OneVariable: {"bn": ("conv",)},
    Lists: {"branches.0.1": ("branches.0.0",), "branches.1.1": ("branches.1.0",)},
    HandsOver: {"block.bn": ("block.conv",)},
    TrainsElsewhere: {"bn": ("conv",)},
}


@needs_known_instructions
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SETTLED)
def test_code_that_the_run_went_through_leaves_no_doubt(case: type[nn.Module], mode: str) -> None:
    net = randomized(case())
    before = fingerprint(net)
    assert edges(net, mode) == SETTLED[case]
    assert fingerprint(net) == before
    new = normswap.convert(net, to="gn")
    assert new._normswap.check.passed
    assert {s.path: s.producers for s in new._normswap.plan.steps} == SETTLED[case]


class OtherBranch(Net):
    """What the run passes over reads the convolution's output."""

    raw = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y)
        return z + y if self.raw or size_of(y) == 1 else z


class OtherBranchCopies(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y)
        if size_of(x) == 1:
            w = y
            z = z + w
        return z


class OtherBranchStoresAndReads(Net):
    """Python 3.13 has one instruction that writes a variable and reads the next."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y)
        return (two := 2) * y + two if size_of(x) == 1 else z


class OtherBranchCalls(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y + self.conv(x * 2) if size_of(x) == 1 else y


class OtherBranchCallsMethod(OtherBranchCalls):
    def twice(self, x: Tensor) -> Tensor:
        return self.conv(x * 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y + self.twice(x) if size_of(x) == 1 else y


class OtherBranchUsesWeight(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.conv2d(x, self.conv.weight * 2) if size_of(x) == 1 else y


class OtherBranchWalks(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if size_of(x) == 1:
            for child in self.children():
                x = child(x)
            return x
        return y


class OtherBranchInHelper(Net):
    """A function that is given the convolution's output makes nothing of it this time."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return with_raw(self.bn(y), y)


def with_raw(z: Tensor, y: Tensor) -> Tensor:
    return z + y if size_of(z) == 1 else z


class OtherBranchInFunctionNeverRun(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        late = lambda z: z + y  # noqa: E731
        z = self.bn(y)
        return late(z) if size_of(x) == 1 else z


class OtherBranchReachesIn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.block.conv(x) if size_of(x) == 1 else self.block(x)


class OtherBranchHandsOver(nn.Module):
    """The block goes to a function that reaches into it, the other way alone."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Net()

    def forward(self, x: Tensor) -> Tensor:
        return inside(self.block, x) if size_of(x) == 1 else self.block(x)


def inside(block: nn.Module, x: Tensor) -> Tensor:
    return block.conv(x)


class OtherBranchHandsOverToMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Net()

    def inside(self, x: Tensor, part: nn.Module) -> Tensor:
        return part.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x, part=self.block) if size_of(x) == 1 else self.block(x)


class InTraining(Net):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        size_of(x)
        y = self.conv(x)
        return (self.bn(y), y) if self.training else self.bn(y)


class OnError(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        try:
            return self.bn(y) if size_of(x) else y
        except RuntimeError:
            return y


class OneOfTwo(nn.Module):
    """Two blocks of one class: the way that only one of them goes is no way that the other went."""

    class Block(Net):
        def __init__(self, raw: bool) -> None:
            super().__init__()
            self.raw = raw

        def forward(self, x: Tensor) -> Tensor:
            size_of(x)
            y = self.conv(x)
            z = self.bn(y)
            if self.raw:
                z = z + y
            return z

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = self.Block(True), self.Block(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


UNSETTLED = [
    OtherBranch, OtherBranchCopies, OtherBranchStoresAndReads, OtherBranchCalls, OtherBranchCallsMethod,
    OtherBranchUsesWeight, OtherBranchWalks, OtherBranchInHelper, OtherBranchInFunctionNeverRun, OtherBranchReachesIn,
    OtherBranchHandsOver, OtherBranchHandsOverToMethod, InTraining, OnError, OneOfTwo,
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", UNSETTLED)
def test_code_that_the_run_passed_over_and_that_gets_at_the_layer_leaves_the_doubt(
    case: type[nn.Module], mode: str
) -> None:
    assert edges(randomized(case()), mode) == {}


@pytest.mark.parametrize("known", [("cpython", set()), ("pypy", {sys.version_info[:2]})], ids=["version", "pypy"])
@pytest.mark.parametrize("case", SETTLED)
def test_a_python_whose_instructions_are_not_known_settles_no_doubt(
    case: type[nn.Module], known: tuple[str, set[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = randomized(case())
    monkeypatch.setattr("normswap.tracing.followed.KNOWN", known)
    assert not any(layer.feed.foldable for layer in normswap.inspect(net).layers)
    assert normswap.convert(net, to="gn")._normswap.check.passed


def test_an_instruction_that_writes_one_variable_and_reads_another_reads_the_other() -> None:
    step = next(dis.get_instructions(size_of))
    both = step._replace(opname="STORE_FAST_LOAD_FAST", argval=("written", "read"))
    assert variables_read(both) == {"read"}
    assert variables_read(step._replace(opname="LOAD_FAST_LOAD_FAST", argval=("a", "b"))) == {"a", "b"}
    assert variables_read(step._replace(opname="STORE_FAST", argval="a")) == set()


def test_a_debugger_that_watches_too_gets_its_trace_back() -> None:
    def trace(frame: object, event: str, arg: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        normswap.inspect(Plain().eval(), X)
        now = sys.gettrace()
    finally:
        sys.settrace(before)
    assert now is trace


@needs_known_instructions
def test_guessed_inputs_say_nothing_of_the_size_of_maps() -> None:
    feed = normswap.inspect(Plain().eval())["bn"].feed
    assert feed.foldable
    assert feed.positions is None
    assert normswap.inspect(Plain().eval(), X)["bn"].feed.positions == 64


@needs_known_instructions
def test_a_network_that_takes_no_guessed_input_stays_in_doubt() -> None:
    class Picky(Plain):
        def forward(self, x: Tensor) -> Tensor:
            if size_of(x) != 8:
                raise ValueError("eight")
            return super().forward(x)

    class Own(Picky):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 2:
                raise ValueError("two")
            return super().forward(x)

    assert edges(Own(), "symbolic") == {}
    assert edges(Own(), "recorded", torch.zeros(2, 3, 8, 8)) == {"bn": ("conv",)}
