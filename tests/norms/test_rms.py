"""RMSNorm: found, listed, frozen, kept, saved, and converted to itself; its formula is for the contract's test too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import bits, run
from torch import Tensor, nn

import normswap
from normswap.errors import OptionError, PlanError
from normswap.norms.registry import identify, norm_named


def by_hand(x: Tensor, bn: nn.Module, eps: float = 1e-5) -> Tensor:
    """What the layer built with a batch norm's gamma computes of `(N, C, *)`, in float64."""
    wide = x.double().movedim(1, -1)
    y = wide / ((wide**2).sum(-1, keepdim=True) / wide.shape[-1] + eps) ** 0.5
    y = y if bn.weight is None else y * bn.weight.double()
    return (y if bn.bias is None else y + bn.bias.double()).movedim(-1, 1)


EXPECTED = {"rms": by_hand}


def tokens(width: int = 8, eps: float | None = None, affine: bool = True) -> nn.Sequential:
    """A linear layer and its RMSNorm, twice, on `(N, L, 3)`."""
    norms = [nn.RMSNorm(width, eps, affine) for _ in range(2)]
    for norm in norms if affine else ():
        nn.init.normal_(norm.weight, 1.0, 0.4)
    return nn.Sequential(nn.Linear(3, width), norms[0], nn.ReLU(), nn.Linear(width, width), norms[1]).eval()


X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))


def test_it_is_found_with_its_channels_last() -> None:
    layers = normswap.inspect(tokens()).layers
    assert [(x.path, x.spec.name, x.state.channels, x.state.channel_dim) for x in layers] == [
        ("1", "rms", 8, -1),
        ("4", "rms", 8, -1),
    ]
    assert "RMSNorm" in str(normswap.inspect(tokens()))


def test_what_people_call_it_is_understood() -> None:
    with pytest.raises(OptionError) as error:
        norm_named("RMSNorm")
    assert error.value.hint == "Did you mean rms?"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_eps_of_none_reads_as_what_torch_adds(dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(4, dtype=dtype)
    eps = identify(norm).read(norm).eps
    x = 1e-4 * torch.randn(3, 4, dtype=dtype)  # so small that the eps is seen
    said = nn.RMSNorm(4, eps=eps, dtype=dtype)
    torch.testing.assert_close(norm(x), said(x), rtol=1e-6 if dtype is torch.float32 else 1e-12, atol=0)
    assert not torch.allclose(norm(x), nn.RMSNorm(4, eps=10 * eps, dtype=dtype)(x), rtol=1e-9, atol=0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_to_itself_it_computes_the_same_bit_for_bit(eps: float | None, affine: bool) -> None:
    net = tokens(eps=eps, affine=affine)
    converted = normswap.convert(net, to="rms", sources=["rms"], example_inputs=X)
    assert converted._normswap.check.passed
    assert [step.transfer for step in converted._normswap.plan.steps] == ["exact", "exact"]
    assert converted[1] is not net[1]
    assert (converted[1].eps, converted[1].elementwise_affine) == (eps, affine)
    assert bits(run(converted, X)) == bits(run(net, X))


def test_another_eps_is_the_one_asked_for() -> None:
    converted = normswap.convert(tokens(), to="rms", sources=["rms"], eps=0.25, example_inputs=X)
    assert {step.transfer for step in converted._normswap.plan.steps} == {"copy"}
    assert (converted[1].eps, converted[4].eps) == (0.25, 0.25)


def test_hooks_and_what_a_user_put_on_it_stay() -> None:
    net = tokens()
    net[1].note = "mine"
    net[1].register_buffer("seen", torch.ones(2))
    called: list[object] = []
    net[1].register_forward_hook(lambda module, args, out: called.append(module))
    converted = normswap.convert(net, to="rms", sources=["rms"], example_inputs=X)
    run(converted, X)
    assert converted[1].note == "mine"
    assert torch.equal(converted[1].seen, torch.ones(2))
    assert called[-1] is converted[1]


def test_a_rule_keeps_it() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(2), nn.RMSNorm(16)).eval()
    plan = normswap.plan(net, to="gn", groups=2)
    assert [(k.path, k.norm) for k in plan.kept] == [("3", "rms")]
    plan = normswap.plan(net, rules={"3": "keep", "1": "gn"}, sources=["bn", "rms"])
    assert [(k.path, k.norm, k.reason) for k in plan.kept] == [("3", "rms", "rule")]


def test_saved_it_loads_with_the_same_outputs(tmp_path: Path) -> None:
    net = tokens(eps=1e-3)
    converted = normswap.convert(net, to="rms", sources=["rms"], example_inputs=X)
    file = normswap.save(converted, tmp_path / "net.safetensors")
    loaded = normswap.load(file, model=tokens(eps=1e-3))
    assert bits(run(loaded, X)) == bits(run(net, X))
    assert bits(run(normswap.revert(loaded), X)) == bits(run(net, X))


def test_frozen_its_gamma_stays() -> None:
    net = normswap.freeze(tokens()).train()
    assert not net[1].weight.requires_grad
    before = net[1].weight.clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    net(X).square().sum().backward()
    optimizer.step()
    assert torch.equal(net[1].weight, before)
    assert not normswap.frozen_drift(net)
    converted = normswap.convert(net.eval(), to="rms", sources=["rms"], example_inputs=X)
    assert not converted[1].weight.requires_grad
    assert normswap.unfreeze(converted)[1].weight.requires_grad


def test_maps_with_channels_second_are_refused_by_name() -> None:
    with pytest.raises(
        PlanError, match=r"1 \(BatchNorm2d\): its channels are the second dimension, the new norm's the"
    ):
        normswap.plan(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), to="rms")
    with pytest.raises(
        PlanError, match=r"1 \(RMSNorm\): its channels are the last dimension, the new norm's the second"
    ):
        normswap.plan(tokens(), to="gn", sources=["rms"])


@pytest.mark.parametrize("beta", [True, False])
def test_gamma_and_beta_of_a_layer_norm_can_be_copied_alone(beta: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8, bias=beta)).eval()
    nn.init.normal_(net[1].weight)
    converted = normswap.convert(net, to="rms", sources=["ln"], transfer="copy")
    assert torch.equal(converted[0].weight, net[0].weight)
    expected = by_hand(net[0](X).movedim(-1, 1), net[1]).movedim(1, -1)
    torch.testing.assert_close(converted(X).double(), expected, rtol=1e-5, atol=1e-6)


def test_one_over_several_dimensions_is_refused() -> None:
    with pytest.raises(PlanError, match="it normalizes over several dimensions"):
        normswap.plan(nn.Sequential(nn.RMSNorm((4, 8))), to="rms", sources=["rms"])


def test_calibrated_towards_a_reference_it_takes_a_new_gamma_and_no_beta() -> None:
    net = tokens()
    other = normswap.convert(net, to="rms", sources=["rms"], eps=4.0, example_inputs=X)
    report = normswap.calibrate(other, net, X.repeat(4, 1, 1))
    assert report.error_after < report.error_before
    assert report.drift_after < report.drift_before
    assert "bias" not in dict(other[1].named_parameters())
