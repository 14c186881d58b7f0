"""Converted networks in the hands of others: opacus, torch.compile, torch.export, ONNX, torchvision's detectors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import DenseNet, ResNet, get_model
from torchvision.models.resnet import Bottleneck

import normswap

SMALL = {
    "resnet": lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10),
    "densenet": lambda: DenseNet(8, (2, 2, 1, 1), 16, num_classes=10),
}
"""Every kind of layer and branch of the networks below, once or twice where these have it tens of times."""
LARGE = ["resnet50", "densenet121"]
NETWORKS = [*SMALL, "mobilenet_v3_small", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]


def built(name: str) -> nn.Module:
    return SMALL[name]() if name in SMALL else get_model(name, weights=None)


def converted(name: str, to: str = "gn") -> nn.Module:
    torch.manual_seed(0)
    return normswap.convert(built(name), to, inplace=True, check=False).eval()


def image(size: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


@pytest.mark.filterwarnings("ignore")  # opacus and its dependencies warn at import
def test_opacus_finds_nothing_wrong_in_a_converted_resnet() -> None:
    from opacus.validators import ModuleValidator

    model = converted("resnet").train()
    assert ModuleValidator.validate(built("resnet"), strict=False)
    assert ModuleValidator.validate(model, strict=False) == []


@pytest.mark.filterwarnings("ignore")
def test_opacus_takes_a_private_step_on_a_converted_network() -> None:
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    model = normswap.convert(net, "gn", groups=2)
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.randint(2, (8,))), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    before = [p.detach().clone() for p in model.parameters()]
    x, y = next((x, y) for x, y in loader if len(x))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_compile_takes_a_converted_network_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = converted(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert relative(model(image()), compiled(image())) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*LARGE, "mobilenet_v3_small"])
def test_inductor_compiles_a_converted_network(name: str) -> None:
    torch._dynamo.reset()
    model = converted(name)
    with torch.no_grad():
        assert relative(model(image()), torch.compile(model)(image())) < 1e-4


@pytest.mark.parametrize("to", ["frozen", "renorm", "ln-channel", "fused"])
def test_compile_takes_our_own_norm_modules(to: str) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = normswap.convert(net, to).eval()
    with torch.no_grad():
        assert relative(model(image(8)), torch.compile(model, backend="aot_eager", fullgraph=True)(image(8))) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export_takes_a_converted_network(name: str) -> None:
    model = converted(name)
    program = torch.export.export(model, (image(),))
    with torch.no_grad():
        assert relative(model(image()), program.module()(image())) < 1e-5


@pytest.mark.parametrize("name", ["resnet", pytest.param("resnet50", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # onnxscript and onnx warn at import and export
def test_a_converted_resnet_runs_in_onnxruntime_with_equal_outputs(name: str, tmp_path: Path) -> None:
    import onnxruntime

    model = converted(name)
    file = tmp_path / f"{name}-gn.onnx"
    torch.onnx.export(model, (image(),), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: image().numpy()})
    with torch.no_grad():
        assert relative(model(image()), torch.from_numpy(output)) < 1e-4


def test_a_converted_faster_rcnn_trains_one_step() -> None:
    torch.manual_seed(0)
    detector = get_model("fasterrcnn_mobilenet_v3_large_320_fpn", weights=None, weights_backbone=None, num_classes=3)
    detector.transform.min_size, detector.transform.max_size = (96,), 128
    model = normswap.convert(detector, "gn", inplace=True, check=False).train()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    target = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 96, 96)], [target])
    total = sum(losses.values())
    total.backward()
    optimizer.step()
    assert torch.isfinite(total)
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_activation_checkpointing_of_a_converted_network_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = normswap.convert(net, "gn", groups=2).train()
    model(image(8)).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, image(8), use_reentrant=False).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
