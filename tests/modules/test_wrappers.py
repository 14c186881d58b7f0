"""A network in a wrapper is converted like one that is in none, and comes back in a wrapper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Residual, bits, classes, contents, randomized, run
from torch import Tensor, nn

import normswap
from normswap.errors import OptionError
from normswap.modules.wrappers import unwrapped

X = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compiled": compiled,
    "both": lambda net: nn.DataParallel(compiled(net)),
}


def steps_of(net: nn.Module) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(s.path, s.transfer, s.producers) for s in normswap.plan(net, "gn", groups=2).steps]


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    return WRAPPERS[request.param]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_wrapped_network_is_folded_like_a_bare_one(wrap: Callable[[nn.Module], nn.Module], inplace: bool) -> None:
    torch._dynamo.reset()
    net = randomized(Residual())
    bare = normswap.convert(net, "gn", groups=2)
    before = contents(net)
    wrapped = wrap(net)
    wrapped(X)  # a compiled network is compiled
    assert steps_of(wrapped) == steps_of(net)
    converted = normswap.convert(wrapped, "gn", groups=2, inplace=inplace)
    assert {type(converted), type(wrapped)} == {type(wrapped)}
    assert contents(unwrapped(converted)) == contents(bare)
    assert (contents(net) == before) is not inplace
    assert (converted is wrapped) is inplace
    torch.testing.assert_close(run(converted, X), run(bare, X))
    reverted = normswap.revert(converted)
    assert reverted is converted
    assert contents(unwrapped(reverted)) == before
    torch.testing.assert_close(run(reverted, X), run(randomized(copy.deepcopy(unwrapped(net))), X))


def test_settings_and_hooks_of_a_wrapper_go_on(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch._dynamo.reset()
    wrapped = wrap(randomized(Residual()).train()).train()
    converted = normswap.convert(wrapped, "ln")
    assert converted.training
    assert all(m.training for m in converted.modules())
    if isinstance(wrapped, nn.DataParallel):
        assert converted.device_ids == wrapped.device_ids
    else:
        assert converted.dynamo_ctx is wrapped.dynamo_ctx


def test_a_wrapped_norm_gets_the_new_one_in_its_place() -> None:
    wrapped = nn.DataParallel(randomized(nn.BatchNorm2d(4)))
    assert normswap.convert(wrapped, "gn", groups=2, inplace=True) is wrapped
    assert isinstance(wrapped.module.norm, nn.GroupNorm)


def test_a_wrapped_network_is_saved_and_loaded_under_its_own_names(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    net = randomized(Residual())
    converted = normswap.convert(wrap(net), "gn", groups=2)
    loaded = normswap.load(normswap.save(converted, tmp_path / "a.safetensors"), model=wrap(Residual()))
    assert contents(loaded) == contents(unwrapped(converted))
    assert contents(normswap.revert(loaded)) == contents(net)


def test_a_wrapped_network_is_calibrated_and_compared_like_a_bare_one(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = randomized(Residual())
    bare, wrapped = normswap.convert(net, "gn", groups=2), normswap.convert(wrap(net), "gn", groups=2)
    for model, reference in ((bare, net), (wrapped, wrap(net))):
        normswap.calibrate(model, reference=reference, data=X)
        assert normswap.verify(reference, model, X).layers
    assert contents(unwrapped(wrapped)) == contents(bare)


@pytest.mark.parametrize("act", [lambda m: normswap.convert(m, "gn", groups=2), normswap.revert])
def test_a_wrapper_that_was_set_up_for_the_parameters_is_refused(
    act: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    monkeypatch.setattr(DistributedDataParallel, "__module__", "torch.nn.parallel.distributed")
    net = DistributedDataParallel(randomized(Residual()))
    before = contents(net)
    with pytest.raises(OptionError, match=r"(?s)DistributedDataParallel was set up for.*wrap the result"):
        act(net)
    assert contents(net) == before


# --- the order of the two networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["calibrate", "distil"])
@pytest.mark.parametrize("to", ["gn", "frozen", "fused"])
def test_the_two_networks_in_the_wrong_order_are_refused_and_left_as_they_are(act: str, to: str) -> None:
    net = randomized(Residual())
    converted = normswap.convert(net, to, **({"groups": 2} if to == "gn" else {}))
    before = contents(net), contents(converted)
    with pytest.raises(OptionError, match="the two are swapped"):
        getattr(normswap, act)(net, reference=converted, data=X)
    assert (contents(net), contents(converted)) == before


def test_a_reference_that_was_converted_otherwise_is_no_wrong_order() -> None:
    net = randomized(Residual())
    frozen, converted = normswap.convert(net, "frozen"), normswap.convert(net, "gn", groups=2)
    assert normswap.calibrate(converted, reference=frozen, data=X).layers
    by_hand = randomized(Residual())
    by_hand.bn1, by_hand.bn2 = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)
    assert normswap.calibrate(by_hand, reference=frozen, data=X).layers
    assert "GroupNorm" in classes(by_hand)
    assert bits(frozen.bn1.running_var) == bits(net.bn1.running_var)
