"""Statistics folded into the gains of weight-normed layers, `W = g v / ||v||`, and everything that is done after it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import bits, bn_eval, contents, grouped, randomized, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import normswap
from normswap.conversion.record import record_of
from normswap.conversion.stabilize import factors_of, folded_weights
from normswap.errors import RevertError
from normswap.modules.gains import gain_of

FORMS = ["parametrized", "hooked"]
OLD_GAIN, NEW_GAIN = "weight_g", "parametrizations.weight.original0"


def weight_normed(layer: nn.Module, form: str, dim: int = 0) -> nn.Module:
    """With a direction that is not of its gain's length, and a gain that has both signs."""
    if form == "parametrized":
        parametrizations.weight_norm(layer, dim=dim)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(layer, dim=dim)
    for name, parameter in layer.named_parameters():
        if name in (OLD_GAIN, NEW_GAIN):
            parameter.data.mul_(torch.linspace(-1.6, 2.3, parameter.numel()).view(parameter.shape))
        elif parameter.dim() > 1:
            parameter.data.mul_(3)
    for compute in layer._forward_pre_hooks.values():
        compute(layer, ())
    return layer


def _batch_norm(dims: int) -> nn.Module:
    return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](4)


LAYERS: dict[str, tuple[Any, int, int]] = {  # what builds the layer, the norm's dimensions, the weight norm's
    "linear": (lambda: nn.Linear(3, 4), 0, 0),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), 1, 0),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, bias=False), 2, 0),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), 3, 0),
    "grouped": (lambda: nn.Conv2d(3, 6, 3, groups=3), 2, 0),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3), 1, 1),
    "transposed2d": (lambda: nn.ConvTranspose2d(3, 4, 3, bias=False), 2, 1),
    "transposed3d": (lambda: nn.ConvTranspose3d(3, 4, 2), 3, 1),
}


class Pair(nn.Module):
    def __init__(self, first: nn.Module, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.norm = first, layer, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(self.first(x)))


def pair(kind: str, form: str) -> tuple[Any, Tensor]:
    """A layer with weight norm and its norm, and an input."""
    torch.manual_seed(0)
    build, dims, dim = LAYERS[kind]
    layer = weight_normed(build(), form, dim)
    norm = nn.BatchNorm2d(6) if kind == "grouped" else _batch_norm(max(dims, 1))
    first = nn.Identity() if dims else nn.Flatten()  # after which nothing has more dimensions than two
    return randomized(Pair(first, layer, norm)), torch.randn(3, 3, *[5] * dims)


def standardised(net: Any, x: Tensor) -> Tensor:
    """What the norm makes of its input before gamma and beta, in float64."""
    plain = copy.deepcopy(net.norm)
    nn.init.ones_(plain.weight)
    nn.init.zeros_(plain.bias)
    return bn_eval(plain, net.layer(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_the_gain_and_the_bias_take_the_statistics_and_the_direction_stays(kind: str, form: str) -> None:
    net, x = pair(kind, form)
    model: Any = normswap.convert(net, "gn", groups=2)
    (step,) = record_of(model).plan.steps
    assert (step.transfer, step.producers) == ("fold", ("layer",))
    scale = (net.norm.running_var + net.norm.eps).rsqrt()
    by_channel = scale.view(*[1] * LAYERS[kind][2], -1, *[1] * (net.layer.weight.dim() - 1 - LAYERS[kind][2]))
    torch.testing.assert_close(model.layer.weight, net.layer.weight * by_channel)  # before any run of it
    torch.testing.assert_close(model.layer(x).double(), standardised(net, x), rtol=1e-4, atol=1e-5)
    direction = "weight_v" if form == "hooked" else "parametrizations.weight.original1"
    assert bits(model.layer.get_parameter(direction)) == bits(net.layer.get_parameter(direction))
    expected = grouped(standardised(net, x), 2, model.norm.eps, net.norm.weight, net.norm.bias)
    torch.testing.assert_close(run(model, x), expected.flatten().float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_fused_network_computes_what_the_original_does(kind: str, form: str) -> None:
    net, x = pair(kind, form)
    model: Any = normswap.convert(net, "fused")
    assert type(model.norm) is nn.Identity
    torch.testing.assert_close(model(x).double(), bn_eval(net.norm, net.layer(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_undone_to_the_bit(kind: str, form: str, dtype: torch.dtype) -> None:
    net, x = pair(kind, form)
    net, x = net.to(dtype), x.to(dtype)
    before, out = contents(net), run(net, x)
    for to in ("gn", "in" if x.dim() > 2 else "ln", "fused", "sync"):
        model: Any = normswap.convert(
            net, to, check=dtype is not torch.bfloat16, **({"groups": 2} if to == "gn" else {})
        )
        model = normswap.revert(model)
        assert contents(model) == before
        assert bits(model.layer.weight) == bits(net.layer.weight)  # which the older form keeps on the layer
        assert bits(run(model, x)) == bits(out)


class Net(nn.Module):
    """Weight-normed convolutions with their norms and a classifier: (N, 3, 6, 6) -> (N, 5)."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv1 = weight_normed(nn.Conv2d(3, 8, 3, padding=1), form)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = weight_normed(nn.Conv2d(8, 8, 3, padding=1, bias=False), form)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        randomized(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("undo", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_gives_the_same_network_and_the_original(form: str, undo: bool, tmp_path: Path) -> None:
    net = Net(form)
    model = normswap.convert(net, "gn", groups=2, undo=undo)
    assert {step.transfer for step in record_of(model).plan.steps} == {"fold"}
    normswap.save(model, tmp_path / "net.safetensors")
    loaded = normswap.load(tmp_path / "net.safetensors", model=Net(form))
    assert contents(loaded) == contents(model)
    assert bits(run(loaded, X)) == bits(run(model, X))
    if undo:
        assert contents(normswap.revert(loaded)) == contents(net)
    else:
        with pytest.raises(RevertError, match="kept nothing"):
            normswap.revert(loaded)


@pytest.mark.parametrize("method", ["moments", "balance", "refit"])
@pytest.mark.parametrize("form", FORMS)
def test_calibrating_gives_each_norm_the_moments_of_the_original_and_leaves_the_way_back(
    form: str, method: str
) -> None:
    net: Any = Net(form)
    model: Any = normswap.convert(net, "gn", groups=4)
    normswap.calibrate(model, net, X, method=method)
    wanted = bn_eval(net.bn2, net.conv2(torch.relu(net.bn1(net.conv1(X)))))
    with torch.no_grad():
        found = model.bn2(model.conv2(torch.relu(model.bn1(model.conv1(X))))).double()
    for reduce in (torch.mean, torch.std):
        torch.testing.assert_close(reduce(found, (0, 2, 3)), reduce(wanted, (0, 2, 3)), rtol=1e-3, atol=1e-3)
    assert contents(normswap.revert(model)) == contents(net)


@pytest.mark.parametrize("form", FORMS)
def test_balancing_has_moved_the_gains(form: str) -> None:
    net: Any = Net(form)
    model: Any = normswap.convert(net, "gn", groups=2)
    before = gain_of(model.conv1).detach().clone()
    normswap.calibrate(model, net, X, method="balance")
    assert not torch.equal(gain_of(model.conv1), before)


@pytest.mark.parametrize("form", FORMS)
def test_what_had_no_statistics_is_fused_with_those_of_images(form: str) -> None:
    """From group norm: the gains take what is estimated, as weights would."""
    source = normswap.convert(Net(form), "gn", groups=8, undo=False)
    model = normswap.convert(source, "fused", missing_statistics="later")
    normswap.calibrate(model, source, X)
    assert {step.transfer for step in record_of(model).plan.steps} == {"absorb"}
    assert torch.isfinite(run(model, X)).all()
    gap = run(model, X) - run(source, X)
    assert gap.norm() < 0.5 * run(source, X).norm()


@pytest.mark.parametrize("form", FORMS)
def test_stabilized_the_weights_are_at_their_old_size_and_directions_have_centralised_gradients(form: str) -> None:
    net: Any = Net(form)
    for norm, var in ((net.bn1, 9.0), (net.bn2, 0.02)):
        norm.running_var.mul_(var)
    model: Any = normswap.convert(net, "gn", groups=2)
    before, out = contents(model), run(model, X)
    ratio = {p: 2 ** round(float((w(net, p).norm() / w(model, p).norm()).log2())) for p in ("conv1", "conv2")}
    factors = factors_of(model)
    assert factors == {f"bn{p[-1]}": r for p, r in ratio.items()}
    directions = folded_weights(model)
    with normswap.stabilized(model):
        assert factors_of(model) == {}
        torch.testing.assert_close(run(model, X), out, rtol=1e-5, atol=1e-5)
        model.train()(X).square().mean().backward()
        assert [direction.shape for direction in directions] == [(8, 3, 3, 3), (8, 8, 3, 3)]
        for direction in directions:
            assert direction.grad.mean((1, 2, 3)).abs().max() < 1e-6 < direction.grad.abs().max()
    assert contents(model) == before


def w(model: nn.Module, path: str) -> Tensor:
    """The weight that a layer computes."""
    layer: Any = model.get_submodule(path)
    layer(torch.zeros(1, layer.in_channels, 4, 4))
    return layer.weight.detach()


@pytest.mark.parametrize("form", FORMS)
def test_a_trained_network_is_told_and_approximately_reverted(form: str) -> None:
    net: Any = Net(form)
    model: Any = normswap.convert(net, "fused")
    gain_of(model.conv1).data.mul_(2)
    with pytest.raises(RevertError, match="conv1"):
        normswap.revert(model)
    model = normswap.revert(model, strict=False)
    torch.testing.assert_close(w(model, "conv1"), 2 * w(net, "conv1"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_goes_on_with_the_gains(form: str) -> None:
    """SGD's momentum of what was multiplied by s is divided by s, channel by channel."""
    net: Any = Net(form)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    net(X).square().mean().backward()
    optimizer.step()
    momentum = optimizer.state[gain_of(net.conv1)]["momentum_buffer"].clone()
    model: Any = normswap.convert(net, "gn", groups=2)
    normswap.remap_optimizer(optimizer, net, model)
    scale = (net.bn1.running_var + net.bn1.eps).rsqrt().view(-1, 1, 1, 1)
    found = optimizer.state[gain_of(model.conv1)]["momentum_buffer"]
    torch.testing.assert_close(found, momentum / scale, rtol=1e-5, atol=1e-7)
    assert any(p is model.conv2.bias for group in optimizer.param_groups for p in group["params"])  # which is new


@pytest.mark.parametrize("form", FORMS)
def test_distilling_trains_gains_and_directions(form: str) -> None:
    net: Any = Net(form)
    model: Any = normswap.convert(net, "gn", groups=2)
    before = contents(model)
    normswap.distil(model, net, X, steps=2, batch_size=8)
    after = contents(model)
    names = [name for name in before if name.startswith("conv1") and not name.endswith("bias")]
    assert len(names) == 2
    assert all(after[name] != before[name] for name in names)
    assert torch.isfinite(run(model, X)).all()


@pytest.mark.parametrize("form", FORMS)
def test_weight_norm_is_removed_from_the_converted_network_alone(form: str) -> None:
    net: Any = Net(form)
    model: Any = normswap.convert(net, "gn", groups=2)
    before, after = run(net, X), run(model, X)
    if form == "hooked":
        nn.utils.remove_weight_norm(model.conv1)
    else:
        parametrize.remove_parametrizations(model.conv1, "weight")
    assert [bits(run(net, X)), bits(run(model, X))] == [bits(before), bits(after)]
    normswap.calibrate(model, net, X)
    with pytest.raises(RevertError, match="conv1"):
        normswap.revert(model)
    model = normswap.revert(normswap.convert(net, "gn", groups=2))
    torch.testing.assert_close(run(model, X), before)


def test_what_parametrize_caches_is_no_weight_of_another_network_or_of_before() -> None:
    net = Net("parametrized")
    wanted = normswap.convert(net, "gn", groups=2)
    normswap.calibrate(wanted, net, X)
    with parametrize.cached(), torch.no_grad():
        net(X)
        model = normswap.convert(net, "gn", groups=2)
        model(X)
        normswap.calibrate(model, net, X)
        assert bits(run(model, X)) == bits(run(wanted, X))
        assert bits(run(normswap.revert(model), X)) == bits(run(net, X))


@pytest.mark.parametrize("name", ["weight_g", "weight_v"])
def test_a_gain_or_direction_that_is_computed_itself_is_not_folded_into(name: str) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    net = Net("hooked")
    parametrize.register_parametrization(net.conv1, name, Doubled())
    out = run(net, X)
    model = normswap.convert(net, "fused")
    assert [step.producers for step in record_of(model).plan.steps] == [(), ("conv2",)]
    torch.testing.assert_close(run(model, X), out, rtol=1e-4, atol=1e-5)
