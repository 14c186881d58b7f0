"""Runs that watch a network: what they show where forwards do not trace, and that they leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import MODES, Net, X, edges, fingerprint, randomized
from holders import Stored, StoredInDict, StoredInList
from memory import Wasteful, peak
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.inspection.inventory import inspect
from normswap.modules.attributes import leaves_of
from normswap.tracing.recorded import _Recorder


def branch(y: Tensor) -> Tensor:
    """A number out of values: no symbolic run gets past it."""
    return y + 1 if float(y.sum()) > 0 else y - 1


class Wrapper(nn.Module):
    """Does not trace; calls its block whole."""

    def __init__(self, block: type[nn.Module] = Net) -> None:
        super().__init__()
        self.block = block()

    def forward(self, x: Tensor) -> Tensor:
        return branch(self.block(x))


class ReachesIn(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return branch(self.block(x)) + self.block.conv(x)


class ReachesInThroughVariable(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        return branch(block(x)) + block.conv(x)


class ReachesInThroughGetattr(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        block = getattr(self, "bl" + "ock")
        return branch(block(x)) + getattr(block, "conv")(x)  # noqa: B009


class ReachesInThroughWalrus(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        if (b := self.block) is not None:
            return branch(b(x)) + b.conv(x)
        return x


class UsesWeightFromOutside(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return branch(F.conv_transpose2d(self.block(x), self.block.conv.weight))


class CallsAnotherMethod(Wrapper):
    class Two(Net):
        def raw(self, x: Tensor) -> Tensor:
            return self.conv(x)

    def __init__(self) -> None:
        super().__init__(self.Two)

    def forward(self, x: Tensor) -> Tensor:
        return branch(self.block(x)) + self.block.raw(x)


class InheritedHelper(ReachesIn):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class HelperMethod(Wrapper):
    def helper(self, x: Tensor) -> Tensor:
        return self.block.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return branch(self.block(x)) + self.helper(x)


def outside(block: nn.Module, x: Tensor) -> Tensor:
    return block.conv(x)


class HandedOver(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return branch(self.block(x)) + outside(self.block, x)


class HandedOverByKeyword(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return branch(self.block(x)) + outside(block=self.block, x=x)


class Several(nn.Module):
    def __init__(self, container: type[nn.Module] = nn.ModuleList) -> None:
        super().__init__()
        blocks = [Net() for _ in range(2)]
        self.blocks = nn.Sequential(*blocks) if container is nn.Sequential else nn.ModuleList(blocks)


class IteratesAndReachesIn(Several):
    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(block(x)) + block.conv(x) for block in self.blocks)


class EnumeratesAndReachesIn(Several):
    def forward(self, x: Tensor) -> Tensor:
        out = x.mean()
        for _, (block, k) in enumerate(zip(self.blocks, (1, 2), strict=True)):
            out = out + branch(block(x)) + block.conv(x) * k
        return out


class IndexesAndReachesIn(Several):
    def forward(self, x: Tensor) -> Tensor:
        return branch(self.blocks[0](x)) + self.blocks[0].conv(x) + self.blocks[-1](x) + self.blocks[-1].conv(x)


class ChildrenAndReachesIn(Several):
    def forward(self, x: Tensor) -> Tensor:
        out = x.mean()
        for child in self.children():
            for block in child:
                out = out + branch(block(x)) + block.conv(x)
        return out


class OwnSequential(nn.Sequential):
    """A Sequential with a forward of its own, that reaches into its elements."""

    def __init__(self) -> None:
        super().__init__(Net(), Net())

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(block(x)) + block.conv(x) for block in self)


class IteratesOverSequential(nn.Module):
    """Keeps what lies between the elements."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        total = branch(x).mean()
        for layer in self.layers:
            x = layer(x)
            total = total + x.mean()
        return total


class CallsAndIterates(IteratesOverSequential):
    """Calls the Sequential whole, and element by element."""

    def forward(self, x: Tensor) -> Tensor:
        total = branch(self.layers(x)).mean()
        for layer in self.layers:
            x = layer(x)
            total = total + x.mean()
        return total


class StoredBelow(Wrapper):
    """What the block keeps is used by its owner."""

    def __init__(self) -> None:
        super().__init__(Stored)

    def forward(self, x: Tensor) -> Tensor:
        return branch(self.block(x)) + self.block.raw


class Twice(nn.Module):
    """The block traces when it is called without a mask, and not with one."""

    class Maskable(Net):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = self.conv(x)
            if mask is None:
                return self.bn(y)
            return self.bn(y) + y if float(mask.sum()) > 0 else self.bn(y)

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Maskable()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.block(x, x.abs())


class HeldInList(nn.Module):
    """A second part, called apart, reaches the first one's convolution through a plain list."""

    class Second(nn.Module):
        def __init__(self, first: nn.Module) -> None:
            super().__init__()
            self.ref = [first]
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.ref[0].conv(x)) + self.ref[0].conv(x)

    def __init__(self) -> None:
        super().__init__()
        self.first = Net()
        self.second = self.Second(self.first)

    def forward(self, x: Tensor) -> Tensor:
        return branch(self.first(x)) + self.second(x)


class PatchedClass(Wrapper):
    """Its forward is not the one in its source."""


PatchedClass.forward = ReachesIn.forward

_scope = {"branch": branch}
exec("def forward(self, x):\n    return branch(self.block(x)) + self.block.conv(x)\n", _scope)
NoSource = type("NoSource", (Wrapper,), {"forward": _scope["forward"]})

OPAQUE_NEVER = [
    ReachesIn, ReachesInThroughVariable, ReachesInThroughGetattr, ReachesInThroughWalrus,
    UsesWeightFromOutside, CallsAnotherMethod, InheritedHelper, HelperMethod, HandedOver, HandedOverByKeyword,
    IteratesAndReachesIn, EnumeratesAndReachesIn, IndexesAndReachesIn, ChildrenAndReachesIn, OwnSequential,
    IteratesOverSequential, CallsAndIterates, StoredBelow, Twice, HeldInList, PatchedClass,
    NoSource,
]  # fmt: skip


@pytest.mark.parametrize("case", OPAQUE_NEVER)
def test_where_the_parent_does_not_trace_doubt_means_no_edge(case: Callable[[], nn.Module]) -> None:
    assert edges(case(), "symbolic") == {}


@pytest.mark.parametrize("case", OPAQUE_NEVER)
def test_a_recorded_run_does_not_settle_what_the_trace_leaves_in_doubt(case: Callable[[], nn.Module]) -> None:
    assert edges(case(), "recorded") == {}


class CallsWholeFromList(Several):
    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(block(x)) for block in self.blocks)


class ChecksForNone(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return branch(self.block(x)) if self.block is not None and hasattr(self.block, "conv") else x


class ChecksType(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.block, Net):
            x = self.block(x)
        return branch(x)


class CheckpointsWhole(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return branch(checkpoint(self.block, x, use_reentrant=False))


class InitializesInside(Wrapper):
    """Code that forward does not run may do what it likes."""

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
        nn.init.ones_(self.block.conv.weight)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Wrapper, {"block.bn": ("block.conv",)}),
        (CallsWholeFromList, {"blocks.0.bn": ("blocks.0.conv",), "blocks.1.bn": ("blocks.1.conv",)}),
        (ChecksForNone, {"block.bn": ("block.conv",)}),
        (ChecksType, {"block.bn": ("block.conv",)}),
        (CheckpointsWhole, {"block.bn": ("block.conv",)}),
        (InitializesInside, {"block.bn": ("block.conv",)}),
    ],
)
def test_parts_that_are_only_called_whole_are_traced_by_themselves(
    case: type[nn.Module], expected: dict[str, tuple[str, ...]]
) -> None:
    assert edges(case(), "symbolic") == expected


# --- runs in more than one mode ---------------------------------------------------------------------------------


def test_a_use_in_training_only_counts() -> None:
    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = self.conv(x)
            if self.training:
                return self.bn(y), y
            return self.bn(y)

    assert edges(Auxiliary(), "symbolic") == {}


def test_a_norm_that_only_training_reaches_is_found() -> None:
    class Head(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.bn(self.conv(x))
            return (y, self.head(y)) if self.training else (y,)

    assert edges(Head(), "symbolic") == {"bn": ("conv",), "head.1": ("head.0",)}
    assert edges(Head(), "recorded") == {"bn": ("conv",), "head.1": ("head.0",)}


def test_an_edge_hidden_by_a_type_check_on_the_value_is_caught_by_the_self_check() -> None:
    class Sly(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = self.bn(y)
            return z + y if isinstance(y, Tensor) else z  # a symbolic value is no Tensor

    with pytest.raises(normswap.NormswapError, match="self-check failed at"):
        normswap.convert(randomized(Sly()), to="ln")
    assert normswap.convert(randomized(Sly()), to="ln", example_inputs=X)._normswap.check.passed


# --- leaving nothing behind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [Stored, StoredInList, StoredInDict, StoredBelow])
def test_a_forward_that_sets_attributes_leaves_no_symbolic_value_and_no_tensor(
    case: type[nn.Module], mode: str
) -> None:
    net = case().train()
    before = fingerprint(net)
    inspect(net, X if mode == "recorded" else None)
    assert fingerprint(net) == before
    held = [leaf for module in net.modules() for leaf in leaves_of(dict(module.__dict__))]
    assert not any(isinstance(leaf, fx.Proxy) for leaf in held)
    assert sum(isinstance(leaf, Tensor) for leaf in held) == len(list(net.parameters())) + len(list(net.buffers()))


def test_a_symbolic_run_calls_no_hook() -> None:
    net = nn.Sequential(Net(), nn.ReLU())
    seen: list[object] = []
    net[0].register_forward_hook(lambda m, args, out: seen.append(out))
    net[0].register_forward_pre_hook(lambda m, args: seen.append(args))
    net[0].conv.register_forward_hook(lambda m, args, out: seen.append(out))
    inspect(net)
    assert seen == []


@pytest.mark.parametrize("mode", MODES)
def test_a_run_moves_no_statistics_and_takes_no_random_numbers(mode: str) -> None:
    net = nn.Sequential(Net(), nn.Dropout(), Net()).train()
    net[2].conv = nn.Conv2d(4, 4, 1)
    before, state = fingerprint(net), torch.get_rng_state()
    inspect(net, X if mode == "recorded" else None)
    assert fingerprint(net) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_that_the_network_does_not_take_are_one_clear_error() -> None:
    net = Net().train()
    before = fingerprint(net)
    with pytest.raises(
        normswap.NormswapError, match=r"Net cannot run on the example inputs \(RuntimeError: .*channels"
    ):
        inspect(net, torch.randn(1, 5, 8, 8))
    assert fingerprint(net) == before


@pytest.mark.parametrize("inputs", [X, (X,), [X]])
def test_example_inputs_are_a_tensor_or_the_forwards_arguments(inputs: object) -> None:
    class First(Net):
        def forward(self, x: Tensor | list[Tensor]) -> Tensor:
            return super().forward(x[0] if isinstance(x, list) else x)

    assert inspect(First(), inputs)["bn"].feed.foldable


def test_a_recorded_run_holds_little_more_than_a_plain_one() -> None:
    model, x = Wasteful().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = peak(lambda: model(x))
    assert peak(lambda: inspect(model, x)) < 1.2 * plain
    assert inspect(model, x)["norm2"].feed.producers == ("conv2",)


def test_the_address_of_a_dead_tensor_stands_for_nothing() -> None:
    recorder = _Recorder(nn.Linear(1, 1))
    first = torch.zeros(64)
    recorder.add("function", "zeros", (), [first])
    view, address = first.data, first.data_ptr()
    del first
    assert len(recorder.origins.known([view])) == 1  # its memory lives
    del view
    others: list[Tensor] = []
    while not others or (others[-1].data_ptr() != address and len(others) < 1000):
        others.append(torch.zeros(64))
    assert not recorder.origins.known(others)
