"""Converting: what the self-check and ready plans catch, and what must not be left behind when it fails."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from convertible import converted
from helpers import Net, X, conv_bn, fingerprint, randomized
from torch import Tensor, nn

import normswap
from normswap.errors import DataError, OptionError, PlanError, SelfCheckError
from normswap.planning.plan import Plan

# --- the self-check -------------------------------------------------------------------------------------------------


def with_producers(made: Plan, producers: dict[str, tuple[str, ...]]) -> Plan:
    values = json.loads(made.to_json())
    for step in values["steps"]:
        step["producers"] = list(producers.get(step["path"], step["producers"]))
    return Plan.from_dict(values)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn2(self.b(self.bn1(self.a(x)).relu())).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "wrong",
    [{"bn1": ("b",), "bn2": ("a",)}, {"bn2": ("head",)}, {"bn2": ("b", "head")}, {"bn2": ()}],
    ids=["swapped", "another", "one too many", "none"],
)
@pytest.mark.parametrize("to", ["ln", "fused"])
def test_a_wrong_edge_is_caught_and_an_in_place_model_is_as_it_was(
    to: str, wrong: dict[str, tuple[str, ...]], dtype: torch.dtype
) -> None:
    net = randomized(Chain()).to(dtype)
    plan = with_producers(normswap.plan(net, to=to), wrong)
    before = fingerprint(net)
    for inplace in (False, True):
        with pytest.raises(SelfCheckError, match=r"the self-check failed at .*nothing was kept"):
            normswap.convert(net, using=plan, inplace=inplace, example_inputs=X.to(dtype))
        # In place, weights went there and back: the same bits in the same Parameter objects.
        assert fingerprint(net) == before


def test_a_layer_that_would_be_folded_into_twice_is_an_error() -> None:
    net = randomized(Chain())
    plan = with_producers(normswap.plan(net, to="ln"), {"bn2": ("a",)})
    with pytest.raises(PlanError, match=r"(?s)bn1: a is folded into more than once.*bn2: a is folded"):
        normswap.convert(net, using=plan)


def test_the_right_plan_passes_with_a_small_error() -> None:
    net = randomized(Chain())
    check = normswap.convert(net, using=normswap.plan(net, to="ln"))._normswap.check
    assert check.passed
    assert 0 <= check.error <= 1e-4
    assert (check.layers, check.total) == (2, 2)


def test_a_network_that_needs_the_old_norm_is_an_error_and_in_place_as_it_was() -> None:
    class Peeks(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.bn.running_var.mean()

    net = randomized(Peeks())
    before = fingerprint(net)
    with pytest.raises(SelfCheckError, match=r"does not run \(AttributeError: .*running_var.*nothing was kept"):
        normswap.convert(net, to="ln", inplace=True)
    assert fingerprint(net) == before


def test_an_interrupt_during_the_self_check_leaves_an_in_place_model_as_it_was() -> None:
    class Interrupted(Net):
        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(self.bn, nn.BatchNorm2d):
                raise KeyboardInterrupt
            return super().forward(x)

    net = randomized(Interrupted())
    before = fingerprint(net)
    with pytest.raises(KeyboardInterrupt):
        normswap.convert(net, to="ln", inplace=True)
    assert fingerprint(net) == before


def test_example_inputs_that_the_network_does_not_take_are_an_error() -> None:
    net = conv_bn(8)
    before = fingerprint(net)
    for options in ({"to": "ln"}, {"using": normswap.plan(net, to="ln")}):
        with pytest.raises(DataError, match="Sequential cannot run on the example inputs"):
            normswap.convert(net, example_inputs=torch.ones(1, 9), **options)
    assert fingerprint(net) == before


def test_where_no_input_is_known_the_check_says_so() -> None:
    class Picky(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) + y

    with pytest.warns(UserWarning, match="the self-check was not run: no input is known") as warned:
        check = converted(randomized(Picky()), "ln")._normswap.check
    assert len(warned) == 1
    assert (check.error, check.passed) == (None, False)
    assert "no input is known" in check.reason
    assert converted(randomized(Picky()), "ln", example_inputs=(X, torch.ones(())))._normswap.check.passed
    assert converted(randomized(Picky()), "ln", check=False)._normswap.check.reason == "not asked for"


def test_the_check_moves_no_statistics_and_takes_no_random_numbers() -> None:
    net = nn.Sequential(conv_bn(8), nn.Dropout(0.5), nn.BatchNorm2d(8)).train()
    state = torch.get_rng_state()
    new = converted(net, "renorm")
    assert torch.equal(torch.get_rng_state(), state)
    assert int(new[2].num_batches_tracked) == int(net[2].num_batches_tracked)
    assert torch.equal(new[0][1].running_mean, net[0][1].running_mean)


# --- ready plans ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [{"to": "ln"}, {"rules": {"*": "ln"}}, {"groups": 2}, {"eps": 1.0}, {"transfer": "copy"}]
)
def test_a_plan_and_what_to_plan_exclude_each_other(other: dict[str, Any]) -> None:
    net = conv_bn(8)
    with pytest.raises(OptionError, match="give either a plan"):
        normswap.convert(net, using=normswap.plan(net, to="ln"), **other)


def test_a_plan_applies_to_another_network_of_the_same_kind() -> None:
    plan = Plan.from_json(normswap.plan(randomized(Chain(), 1), to="ln").to_json())
    net = randomized(Chain(), 2)
    assert normswap.convert(net, using=plan)._normswap.check.passed


class Missing(Chain):
    def __init__(self) -> None:
        super().__init__()
        del self.bn2

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.bn1(self.a(x)))


class Wider(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.b, self.bn2 = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)


class OtherNorm(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.bn2 = nn.GroupNorm(1, 4)


class Stripped(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(4, track_running_stats=False)


class Replaced(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Sequential(nn.Conv2d(4, 4, 1))


class Aliased(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.bn2


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Missing, "bn2: there is no such layer"),
        (Wider, "bn2: it has 6 channels, the plan says 4"),
        (OtherNorm, "bn2: it is GroupNorm, the plan says bn"),
        (Stripped, "bn2: it has no running statistics"),
        (Replaced, "bn2: there is no layer to fold into at b"),
        (Aliased, "bn2: its names are bn2, again"),
    ],
)
def test_a_plan_for_another_network_is_one_clear_error(other: type[nn.Module], said: str) -> None:
    plan = normswap.plan(randomized(Chain()), to="gn", groups=2)
    net = randomized(other())
    before = fingerprint(net)
    with pytest.raises(PlanError, match=f"(?s)the plan does not fit this model:.*{said}"):
        normswap.convert(net, using=plan, inplace=True)
    assert fingerprint(net) == before


def test_every_layer_that_a_plan_does_not_fit_is_listed() -> None:
    plan = normswap.plan(randomized(Chain()), to="gn", groups=2)
    with pytest.raises(PlanError) as caught:
        normswap.convert(nn.Sequential(nn.Conv2d(3, 4, 1)), using=plan)
    assert caught.value.problems == ("bn1: there is no such layer", "bn2: there is no such layer")
