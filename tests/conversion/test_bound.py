"""A plan bound to a model: what is found, and that it is found once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import conv_bn, randomized
from torch import nn

import normswap
from normswap.conversion.bound import bind, bound_after
from normswap.errors import PlanError
from normswap.norms import registry


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[nn.Module]:
    """How often each BatchNorm2d has been read."""
    counts: Counter[nn.Module] = Counter()
    spec = registry.norm_named("bn")

    def read(module: nn.Module) -> normswap.norms.spec.NormState:
        counts[module] += 1
        return spec.read(module)

    monkeypatch.setitem(registry._BY_CLASS, nn.BatchNorm2d, replace(spec, read=read))
    registry._of_class.cache_clear()
    yield counts
    registry._of_class.cache_clear()


def test_a_ready_plan_reads_each_norm_once(reads: Counter[nn.Module]) -> None:
    net = nn.Sequential(conv_bn(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    made = normswap.plan(net, "gn", groups=2, transfer="copy")
    reads.clear()
    normswap.convert(net, using=made, inplace=True, check=False)
    assert sorted(reads.values()) == [1, 1]


def test_a_bound_step_holds_the_norm_and_the_layers_in_front_of_it() -> None:
    net = randomized(conv_bn(4)).eval()
    (step,) = bind(net, normswap.plan(net, "gn", groups=2))
    assert step.module is step.norm is net[1]
    assert step.producers == (net[0],)
    assert step.spec.name == "bn"
    assert step.state.running_mean is net[1].running_mean


def test_after_the_conversion_it_holds_what_took_the_norm_s_place() -> None:
    net = randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))).eval()
    made = normswap.plan(net, "gn", groups=2)
    converted = normswap.convert(net, using=made)
    (step,) = bound_after(converted, made)
    assert step.module is converted[1]
    assert step.norm is converted[1].norm
    assert step.spec.name == "gn"
    assert torch.equal(step.state.weight, net[1].weight)


def test_a_step_whose_module_is_no_norm_cannot_be_read() -> None:
    net = conv_bn(4)
    made = normswap.plan(net, "gn", groups=2)
    net[1] = nn.Identity()
    with pytest.raises(PlanError, match="1 is Identity, no norm"):
        _ = bound_after(net, made).steps[0].state
