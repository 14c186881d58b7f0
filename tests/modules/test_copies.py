"""Copies of traced and compiled networks lose nothing that matters."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import Residual, X, contents, conv_bn, randomized, relative, run
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import normswap
from normswap.modules.tree import copied

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    return randomized(nn.Sequential(conv_bn(8), nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU())))


def extractor() -> nn.Module:
    return create_feature_extractor(network(), {"1": "out"})


def traced() -> nn.Module:
    return fx.symbolic_trace(network())


@pytest.mark.parametrize("build", [extractor, traced])
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_has_the_training_flags_of_each_layer(build: type[nn.Module], training: bool) -> None:
    net = build().train(training)
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    norm.train(not training)
    twin = copied(net)
    assert [m.training for m in twin.modules()] == [m.training for m in net.modules()]
    if hasattr(net, "eval_graph"):
        assert (twin.graph is twin.train_graph) is training


@pytest.mark.parametrize("build", [extractor, traced])
def test_a_norm_that_a_conversion_keeps_computes_what_it_did(build: type[nn.Module]) -> None:
    net = build().eval()
    converted = normswap.convert(net, rules={"0.1": "frozen", "*": "keep"})
    with torch.no_grad():  # in the mode that it came in
        before, after = ((out["out"] if isinstance(out, dict) else out) for out in (net(IMAGES), converted(IMAGES)))
    assert relative(before, after) < 1e-6


def test_a_copy_of_a_traced_network_keeps_hooks_and_attributes() -> None:
    net = traced()
    net.note = ["kept"]
    calls: list[Tensor] = []
    net.register_forward_hook(lambda module, args, out: calls.append(out))
    twin = copied(net)
    assert twin.note == ["kept"]
    assert twin.note is not net.note
    twin(IMAGES)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("build", "journey"),
    [(extractor, "deepcopy"), (extractor, "again"), (traced, "deepcopy"), (traced, "again"), (traced, "pickle")],
)
def test_a_copied_graph_can_be_reverted_and_so_can_its_model(build: type[nn.Module], journey: str) -> None:
    net = build().eval()
    before = contents(net)
    converted = normswap.convert(net, "gn", groups=2)
    twin = copy.deepcopy(converted)
    if journey == "again":
        twin = copy.deepcopy(twin)
    elif journey == "pickle":
        file = io.BytesIO()
        torch.save(converted, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    for each in (twin, converted):
        assert contents(normswap.revert(each)) == before
        with pytest.raises(normswap.NormswapError, match="nothing to revert"):
            normswap.revert(copy.deepcopy(each))


def test_a_copied_compiled_network_can_be_reverted() -> None:
    net = randomized(Residual())
    before = contents(net)
    converted = normswap.convert(torch.compile(net, backend="eager"), "gn", groups=2)
    twin = copy.deepcopy(converted)
    assert contents(normswap.revert(twin)._orig_mod) == before
    assert relative(run(net, X[:, :1].expand(-1, 4, -1, -1)), run(twin, X[:, :1].expand(-1, 4, -1, -1))) < 1e-6


def test_a_network_with_a_weight_norm_hook_is_copied_and_goes_on_computing_its_weight() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        net = nn.Sequential(randomized(conv_bn(8)), nn.utils.weight_norm(nn.Linear(8, 4)))
    net = nn.Sequential(net[0], nn.AdaptiveAvgPool2d(1), nn.Flatten(), net[1]).eval()
    assert net[3].weight.grad_fn is not None
    converted = normswap.convert(net, "frozen")
    assert relative(run(net, IMAGES), run(converted, IMAGES)) < 1e-6
    with torch.no_grad():
        converted[3].weight_g.mul_(2)
    layer = net[3]
    weight = 2 * layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)
    run(converted, IMAGES)
    torch.testing.assert_close(converted[3].weight, weight)
    assert contents(normswap.revert(normswap.convert(net, "fused"))).keys() == contents(net).keys()
