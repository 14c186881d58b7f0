"""Walking and replacing, on modules that have nothing to do with norms."""

from __future__ import annotations

import functools
from collections import OrderedDict

import pytest
import torch
from helpers import fingerprint
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.errors import NormswapError
from normswap.modules.hooks import adopt
from normswap.modules.path_ranges import matches
from normswap.modules.restore import evaluating, undisturbed
from normswap.modules.tree import aliases, copied, hidden_references, module_at, replace_module


class Shared(nn.Module):
    """One linear layer under four names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = self.first
        self.inner = nn.Sequential(OrderedDict(a=nn.ReLU(), b=self.first))
        self.more = nn.ModuleDict({"x": self.first})
        self.absent = None
        self.register_module("nothing", None)


def test_aliases_lists_every_name_of_every_module_in_traversal_order() -> None:
    net = Shared()
    found = aliases(net)
    assert found[net.first] == ["first", "second", "inner.b", "more.x"]
    assert [names[0] for names in found.values()] == ["", "first", "inner", "inner.a", "more"]
    every = [name for names in found.values() for name in names]
    assert sorted(every) == sorted(name for name, _ in net.named_modules(remove_duplicate=False))


def test_a_module_that_is_its_own_descendant_does_not_hang_the_walk() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
    net[0].add_module("up", net)
    assert [names[0] for names in aliases(net).values()] == ["", "0", "0.0"]


def test_replace_puts_the_new_module_at_every_path_and_keeps_the_order() -> None:
    net, new = Shared(), nn.Identity()
    root = replace_module(net, aliases(net)[net.first], new)
    assert root is net
    assert net.first is net.second is net.inner.b is net.more["x"] is new
    assert list(net._modules) == ["first", "second", "inner", "more", "nothing"]


def test_replacing_the_root_returns_the_new_one() -> None:
    new = nn.Identity()
    assert replace_module(nn.Linear(1, 1), [""], new) is new


@pytest.mark.parametrize("path", ["third", "inner.c", "first.weight", "nothing.x"])
def test_a_path_that_does_not_exist_is_a_key_error(path: str) -> None:
    with pytest.raises(KeyError, match=path):
        module_at(Shared(), path)
    with pytest.raises(KeyError):
        replace_module(Shared(), [path], nn.Identity())


def test_a_parent_whose_add_module_and_setattr_raise_does_not_interfere() -> None:
    class Stubborn(nn.Sequential):
        closed = False

        def add_module(self, name: str, module: nn.Module | None) -> None:
            if self.closed:
                raise RuntimeError("no")
            super().add_module(name, module)

        def __setattr__(self, name: str, value: object) -> None:
            if self.closed:
                raise RuntimeError("no")
            super().__setattr__(name, value)

    net, new = Stubborn(nn.ReLU(), nn.Linear(1, 1)), nn.Identity()
    Stubborn.closed = True
    replace_module(net, ["1"], new)
    assert net[1] is new


@pytest.mark.parametrize(
    ("pattern", "path", "covered"),
    [
        ("layer4.*", "layer4.0.bn1", True),
        ("layer4", "layer4.0.bn1", True),
        ("layer4", "layer40.bn1", False),
        ("*.bn2", "layer1.0.bn2", True),
        ("*", "", True),
        ("bn?", "bn1", True),
        ("bn1", "layer1.bn1", False),
        ("[ab].x", "b.x", True),
    ],
)
def test_a_pattern_covers(pattern: str, path: str, covered: bool) -> None:
    assert matches(pattern, path) is covered


# --- handing over -----------------------------------------------------------------------------------------------


def test_adopted_hooks_run_and_their_handles_still_remove_them() -> None:
    old, new = nn.Linear(2, 2), nn.Identity()
    calls: list[str] = []
    handles = [
        old.register_forward_hook(lambda *a: calls.append("after")),
        old.register_forward_pre_hook(lambda *a: calls.append("before")),
        old.register_forward_hook(lambda m, a, k, o: calls.append("kwargs"), with_kwargs=True),
        old.register_forward_hook(lambda *a: calls.append("always"), always_call=True),
    ]
    adopt(new, old)
    new(torch.ones(1, 2))
    assert sorted(calls) == ["after", "always", "before", "kwargs"]
    for handle in handles:
        handle.remove()
    new(torch.ones(1, 2))
    assert len(calls) == 4


def test_an_adopted_full_backward_hook_stays_a_full_one() -> None:
    old, new = nn.Linear(2, 2), nn.Tanh()
    seen: list[Tensor] = []
    old.register_full_backward_hook(lambda m, into, out: seen.extend(into))
    adopt(new, old)
    x = torch.ones(1, 2, requires_grad=True)
    new(x).sum().backward()
    assert torch.equal(seen[0], x.grad)
    new.register_full_backward_hook(lambda *a: None)  # refused beside a legacy hook


def test_adopted_attributes_leave_the_new_modules_own_alone() -> None:
    old, new = nn.Linear(2, 3), nn.Linear(5, 7)
    old.note, old.in_features, old.secret = "mine", 2, 1
    adopt(new, old, known=frozenset({"secret"}))
    assert new.note == "mine"
    assert new.in_features == 5
    assert not hasattr(new, "secret")


# --- leaving no trace -------------------------------------------------------------------------------------------


class Messy(nn.Module):
    """A forward that leaves everything changed that a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("swapped", torch.zeros(2))
        self.calls = 0
        self.seen: list[Tensor] = [torch.ones(1)]
        self.cache: dict[str, list[Tensor]] = {"x": []}
        self.names = {"a"}
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.swapped = x.detach()[0]
        self.calls += 1
        self.seen.append(x)
        self.cache["x"].append(x)
        self.cache["y"] = []
        self.names.add("b")
        self.last = x
        self.fresh = x
        self.late = nn.ReLU()
        self.layer.extra = x
        torch.rand(1)
        return self.layer(x)


@pytest.mark.parametrize("fails", [False, True])
def test_undisturbed_undoes_what_a_forward_leaves_behind(fails: bool) -> None:
    net = Messy()
    before, state, last = fingerprint(net), torch.get_rng_state(), list(net.cache["x"])
    try:
        with undisturbed(net):
            net(torch.ones(1, 2))
            assert net.calls == 1
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert fingerprint(net) == before
    assert net.cache == {"x": last} == {"x": []}
    assert torch.equal(torch.get_rng_state(), state)


class Collecting(nn.Module):
    """Its first forward registers hooks that collect what layers give, as many a network of transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)
        self.collected: list[Tensor] = []

    def collect(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        self.collected.append(out)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "hooked"):
            for layer in self.layers:
                layer.register_forward_hook(self.collect)
            self.hooked = True
        self.collected.clear()
        self.layers(x)
        first, second = self.collected
        return self.norm(first + second)


def test_hooks_that_a_first_forward_registers_are_registered_once() -> None:
    net, x = Collecting().eval(), torch.ones(1, 3, 4, 4)
    normswap.inspect(net)
    assert not any(layer._forward_hooks for layer in net.layers)
    converted = normswap.convert(net, "gn", groups=2, example_inputs=x)
    assert net(x).shape == converted(x).shape == (1, 4, 4, 4)


def test_evaluating_gives_every_module_its_own_flag_back() -> None:
    net = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU().eval(), nn.ReLU()))
    net[1].training = False
    flags = [m.training for m in net.modules()]
    with evaluating(net):
        assert not any(m.training for m in net.modules())
    assert [m.training for m in net.modules()] == flags
    with evaluating(net, training=True):
        assert all(m.training for m in net.modules())
    assert [m.training for m in net.modules()] == flags


# --- modules outside the tree -----------------------------------------------------------------------------------


def test_hidden_references_finds_modules_in_plain_attributes() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Sequential(nn.Tanh()))
    layer, other = net[0], net[1]
    net[2].listed = [other, layer]
    net.nested = {"a": ({"b": [layer]},)}
    net.method = layer.forward
    object.__setattr__(net[2], "direct", layer)
    net.__dict__["direct"] = other
    found = [place for place in hidden_references(aliases(net)) if place[2] is layer]
    assert sorted((path, name) for path, name, module in found) == [
        ("", "method"), ("", "nested"), ("2", "direct"), ("2", "listed"),
    ]  # fmt: skip
    assert {module for *_, module in found} == {layer}


def test_hidden_references_looks_into_closures_defaults_and_partial_calls() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Sequential())
    layer = net[0]

    def called(x: object, *, keyword: object = layer) -> object:
        return keyword

    net[1].closure = lambda x: layer(x)
    net[1].nested = [lambda x: net[1].closure(x), functools.partial(lambda f, x: f(x), lambda x: layer(x))]
    net[1].partial = functools.partial(F.relu, layer.weight)
    net[1].argument = functools.partial(map, layer)
    net[1].keyword = {"a": called}
    found = {name for path, name, module in hidden_references(aliases(net)) if module is layer}
    assert found == {"closure", "nested", "argument", "keyword"}


def test_a_closure_that_holds_its_owner_or_nothing_yet_is_no_hidden_reference() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.call = lambda x: self.norm(x)
            self.empty = lambda x: later(x)
            if self is None:
                later = self.norm

    assert hidden_references(aliases(Owner())) == []


def test_registered_children_are_no_hidden_references() -> None:
    net = Shared()
    assert hidden_references(aliases(net)) == []


def test_a_model_that_cannot_be_copied_names_the_way_out() -> None:
    class Single(nn.Module):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("I am the only one")

    with pytest.raises(
        NormswapError, match=r"Single cannot be deep-copied \(TypeError: I am the only one\)\n.*inplace=True"
    ):
        copied(Single())
