"""What a network keeps of its values, on objects of its own and in functions, is used, and is not there afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from helpers import MODES, Net, edges, randomized
from torch import Tensor

import normswap


class State:
    """A cache of the network's own."""

    def __init__(self) -> None:
        self.raw: object = None
        self.steps = [0]


class Slots:
    __slots__ = ("raw", "steps")

    def __init__(self) -> None:
        self.steps = [0]


class KeepsOnObject(Net):
    def __init__(self, state: Callable[[], object] = State) -> None:
        super().__init__()
        self.state = state()

    def forward(self, x: Tensor) -> Tensor:
        self.state.raw = self.conv(x)
        self.state.steps.append(1)
        return self.bn(self.state.raw)


class KeepsInDeque(Net):
    def __init__(self) -> None:
        super().__init__()
        self.last: deque[object] = deque(maxlen=3)

    def forward(self, x: Tensor) -> Tensor:
        self.last.append(self.conv(x))
        return self.bn(self.last[-1])


class KeepsInClosure(Net):
    """A function that it was given keeps what passes through it."""

    def __init__(self) -> None:
        super().__init__()
        kept: list[object] = []

        def keep(y: object) -> object:
            kept.append(y)
            return y

        self.keep, self.kept = keep, lambda: kept

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.keep(self.conv(x)))


KEEPERS = {
    "an object": KeepsOnObject,
    "an object with slots": lambda: KeepsOnObject(Slots),
    "a namespace": lambda: KeepsOnObject(lambda: SimpleNamespace(steps=[0])),
    "an object in a list": lambda: KeepsOnObject(lambda: Holder(State())),
    "a deque": KeepsInDeque,
    "a closure": KeepsInClosure,
}


class Holder:
    """Passes on to an object that it has in a list."""

    def __init__(self, inner: State) -> None:
        self.__dict__["inner"] = [inner]

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["inner"][0], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.__dict__["inner"][0], name, value)

    def __reduce__(self) -> tuple[object, ...]:
        return Holder, (self.__dict__["inner"][0],)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KEEPERS)
def test_what_a_network_keeps_on_an_object_is_used_and_put_back(name: str, mode: str) -> None:
    net = randomized(KEEPERS[name]())
    assert edges(net, mode) == {}
    if name == "a deque":
        assert len(net.last) == 0
    elif name == "a closure":
        assert net.kept() == []
    else:
        assert net.state.steps == [0]
        assert getattr(net.state, "raw", None) is None
    normswap.convert(net, to="ln")  # which copies it
