"""Where a network came from: found only when a rebuilt one is the same in every respect that matters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents, randomized, relative, run
from torch import nn
from torchvision.models import GoogLeNet, ResNet, get_model
from torchvision.models.resnet import BasicBlock, Bottleneck

import normswap
from normswap.checkpoint.saving import load, save
from normswap.checkpoint.source_recovery import source_of
from normswap.conversion.record import record_of

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def found(model: nn.Module, to: str = "gn", **kwargs: Any) -> dict[str, Any] | None:
    converted = normswap.convert(model, to, check=False, **kwargs)
    record = record_of(converted)
    return source_of(converted, record.plan, record.undo)


def source(kind: str, name: str, **args: Any) -> dict[str, Any]:
    return {"kind": kind, "name": name, "args": args, "variant": None, "config": None}


def with_head(model: Any, classes: int) -> nn.Module:
    model.fc = nn.Linear(model.fc.in_features, classes)
    return model


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: get_model("resnet18"), source("torchvision", "resnet18")),
        (lambda: get_model("resnet34"), source("torchvision", "resnet34")),
        (lambda: get_model("resnet18", num_classes=7), source("torchvision", "resnet18", num_classes=7)),
        (lambda: with_head(get_model("resnet18"), 3), source("torchvision", "resnet18", num_classes=3)),
        (lambda: get_model("mobilenet_v3_small"), source("torchvision", "mobilenet_v3_small")),
        (lambda: get_model("shufflenet_v2_x0_5"), source("torchvision", "shufflenet_v2_x0_5")),
        (lambda: get_model("r3d_18"), source("torchvision", "r3d_18")),
        (
            lambda: get_model("lraspp_mobilenet_v3_large", weights_backbone=None),
            source("torchvision", "lraspp_mobilenet_v3_large"),
        ),
        (
            lambda: get_model("fasterrcnn_mobilenet_v3_large_320_fpn", weights_backbone=None),
            source("torchvision", "fasterrcnn_mobilenet_v3_large_320_fpn"),
        ),
    ],
)
def test_torchvisions_networks_are_found(build: Callable[[], nn.Module], expected: dict[str, Any]) -> None:
    assert found(build(), "frozen") == expected


@pytest.mark.parametrize("to", ["gn", "fused", "sync"])
def test_the_target_does_not_matter(to: str) -> None:
    assert found(get_model("resnet18"), to) == source("torchvision", "resnet18")
    assert found(get_model("resnet18"), to, undo=False) == source("torchvision", "resnet18")


class Own(ResNet):
    """torchvision's class with another forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def other_stride() -> nn.Module:
    model = get_model("resnet18")
    model.layer4[0].conv1.stride = (1, 1)
    model.layer4[0].downsample[0].stride = (1, 1)
    return model


def other_eps() -> nn.Module:
    model = get_model("resnet18")
    model.bn1.eps = 1e-3
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
        lambda: Own(BasicBlock, [2, 2, 2, 2]),
        lambda: ResNet(BasicBlock, [1, 1, 1, 1]),
        lambda: ResNet(Bottleneck, [3, 4, 6, 3], replace_stride_with_dilation=[False, False, True]),
        lambda: nn.Sequential(get_model("resnet18")),
        other_stride,
        other_eps,
        lambda: GoogLeNet(init_weights=False, transform_input=True),
    ],
    ids=["own", "subclass", "depth", "dilation", "wrapped", "stride", "eps", "attribute"],
)
def test_a_network_that_no_name_builds_exactly_has_no_source(build: Callable[[], nn.Module]) -> None:
    assert found(build()) is None


def test_a_timm_network_is_found_with_its_number_of_classes() -> None:
    timm = pytest.importorskip("timm")
    assert found(timm.create_model("resnet10t")) == source("timm", "resnet10t")
    assert found(timm.create_model("resnet10t", num_classes=5)) == source("timm", "resnet10t", num_classes=5)
    assert found(timm.create_model("resnet10t", num_classes=0)) == source("timm", "resnet10t", num_classes=0)
    assert found(timm.create_model("resnet10t", output_stride=8)) is None


@pytest.mark.parametrize("labels", [3, 12])
def test_a_transformers_network_carries_its_config_and_is_loaded_without_a_hub(tmp_path: Path, labels: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=labels)
    original = randomized(transformers.ResNetForImageClassification(config))
    converted = normswap.convert(original, "gn", groups=2)
    loaded = load(save(converted, tmp_path / "a.safetensors"))
    assert record_of(loaded).source["kind"] == "hf"
    assert record_of(loaded).source["config"]["class"] == "ResNetForImageClassification"
    assert len(loaded.config.id2label) == labels
    assert contents(loaded) == contents(converted)
    assert relative(run(converted, IMAGE), run(loaded, IMAGE)) < 1e-5


def test_a_network_found_is_loaded_without_its_caller(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    original = randomized(timm.create_model("resnet10t", num_classes=3))
    converted = normswap.convert(original, "gn")
    loaded = load(save(converted, tmp_path / "a.safetensors"))
    assert type(loaded) is type(original)
    assert contents(loaded) == contents(converted)
    assert contents(normswap.revert(loaded)) == contents(original)
