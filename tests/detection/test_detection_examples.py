"""Roles, conversion and training in the networks of other libraries, at tiny size: DETR, timm, detectron2, policies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectors import FEW, SMALL, images, loss_of, worn
from helpers import relative
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import models

import normswap
from normswap.detection import convert, detector


def roles(network: nn.Module) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for layer in normswap.inspect(network, feeds=False).layers:
        found.setdefault(layer.role, set()).add(layer.spec.name)
    return found


def how(network: nn.Module) -> set[str]:
    """What became of the statistics, once the self-check has proved it on every layer."""
    record = network.__dict__["_normswap"]
    assert record.check.passed
    assert record.check.layers == record.check.total
    return {step.transfer for step in record.plan.steps}


# --- transformers: DETR -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detr() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, num_queries=5, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    return worn(transformers.DetrForObjectDetection(config))


def test_detr_is_a_backbone_of_frozen_norms_and_a_head(detr: nn.Module) -> None:
    assert roles(detr) == {"backbone": {"frozen"}, "head": {"ln"}}


@pytest.mark.parametrize("to", ["frozen", "fused"])
def test_detr_computes_the_same_with_frozen_and_fused_norms(detr: nn.Module, to: str) -> None:
    pixels = torch.stack(images())
    converted = convert(detr, backbone=to)
    how(converted)
    with torch.no_grad():
        before, after = detr(pixels), converted(pixels)
    assert relative(before.logits, after.logits) <= 1e-4
    assert relative(before.pred_boxes, after.pred_boxes) <= 1e-4


def test_detrs_backbone_becomes_gn_and_trains_with_boxes(detr: nn.Module) -> None:
    pytest.importorskip("scipy")  # the matcher's
    converted = convert(detr, backbone="gn", groups=4, example_inputs=torch.stack(images()))
    assert how(converted) == {"fold"}
    assert roles(converted) == {"backbone": {"gn"}, "head": {"ln"}}
    converted.train()
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])} for _ in range(2)]
    loss = converted(torch.stack(images()), labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    gammas = [p for n, p in converted.named_parameters() if "normalization" in n]
    assert gammas
    assert all(p.grad is not None for p in gammas)


# --- timm in torchvision ------------------------------------------------------------------------------------------


def test_a_timm_network_is_converted_and_becomes_the_backbone_of_a_torchvision_detector() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    backbone = worn(timm.create_model("resnet10t", features_only=True))
    converted = normswap.convert(backbone, "gn", channels_per_group=8)
    how(converted)
    network = detector("fasterrcnn", backbone=converted, num_classes=4, trainable_layers=3, **SMALL, **FEW)
    assert roles(network) == {"backbone": {"gn"}, "fpn": {"gn"}, "head": {"gn"}}
    assert list(network.backbone(torch.stack(images()))) == ["0", "1", "2", "3", "pool"]
    loss = loss_of(network)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None for p in network.backbone.body.network.layer1.parameters())
    assert all(p.grad is not None for p in network.backbone.body.network.layer4.parameters())


# --- detectron2: a registry of builders, convolutions that hold their norm, a frozen norm of its own ----------------

REGISTRY: dict[str, Callable[[dict[str, Any]], nn.Module]] = {}


class FrozenBN(nn.Module):
    """detectron2.layers.FrozenBatchNorm2d: buffers alone, and F.batch_norm where no gradient is wanted."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class ConvOfDetectron2(nn.Conv2d):
    """detectron2.layers.Conv2d: the norm and the activation are its own, inside its forward."""

    def __init__(self, *args: Any, norm: nn.Module | None = None, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class TinyFPN(nn.Module):
    """Paths as in detectron2's FPN: backbone.bottom_up.*, backbone.fpn_lateral*, backbone.fpn_output*."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.bottom_up = nn.Sequential(
            ConvOfDetectron2(3, 8, 3, 4, 1, bias=False, norm=norm(8), activation=F.relu),
            ConvOfDetectron2(8, 16, 3, 2, 1, bias=False, norm=norm(16), activation=F.relu),
        )
        self.fpn_lateral3 = ConvOfDetectron2(16, 8, 1, bias=False, norm=nn.BatchNorm2d(8))
        self.fpn_output3 = ConvOfDetectron2(8, 8, 3, padding=1, bias=False, norm=nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.fpn_output3(self.fpn_lateral3(self.bottom_up(x)))


class TinyDetector(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.roi_heads = nn.ModuleDict({"box_head": ConvOfDetectron2(8, 8, 3, norm=nn.BatchNorm2d(8))})

    def forward(self, x: Tensor) -> Tensor:
        return self.roi_heads["box_head"](self.backbone(x))


def register(build: Callable[[dict[str, Any]], nn.Module]) -> Callable[[dict[str, Any]], nn.Module]:
    REGISTRY[build.__name__] = build
    return build


@register
def build_tiny_fpn_backbone(cfg: dict[str, Any]) -> nn.Module:
    """A config names a builder, the builder makes the network: the converted one is registered the same way."""
    return TinyFPN({"FrozenBN": FrozenBN, "BN": nn.BatchNorm2d}[cfg["NORM"]])


@register
def build_tiny_fpn_backbone_gn(cfg: dict[str, Any]) -> nn.Module:
    return convert(build_tiny_fpn_backbone(cfg), backbone="gn", fpn="gn", groups=4)


def test_a_detectron2_style_network_has_its_roles_and_its_frozen_norms_are_known() -> None:
    torch.manual_seed(0)
    network = worn(TinyDetector(REGISTRY["build_tiny_fpn_backbone"]({"NORM": "FrozenBN"})))
    found = normswap.inspect(network)
    assert not found.suspects
    assert {x.path: (x.role, x.spec.name) for x in found.layers} == {
        "backbone.bottom_up.0.norm": ("backbone", "frozen"),
        "backbone.bottom_up.1.norm": ("backbone", "frozen"),
        "backbone.fpn_lateral3.norm": ("fpn", "bn"),
        "backbone.fpn_output3.norm": ("fpn", "bn"),
        "roi_heads.box_head.norm": ("head", "bn"),
    }


def test_a_convolution_that_holds_its_norm_is_prescaled_which_is_exact_too() -> None:
    torch.manual_seed(0)
    network = worn(TinyDetector(REGISTRY["build_tiny_fpn_backbone"]({"NORM": "FrozenBN"})))
    converted = convert(network, backbone="gn", fpn="keep", head="gn", groups=4)
    assert how(converted) == {"prescale"}
    same = convert(network, "frozen")
    with torch.no_grad():
        x = torch.stack(images())
        assert relative(network(x), same(x)) <= 1e-4
    converted.train()(x).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in converted.parameters())


def test_a_converted_backbone_is_registered_like_any_other() -> None:
    network = TinyDetector(REGISTRY["build_tiny_fpn_backbone_gn"]({"NORM": "BN"}))
    assert roles(network) == {"backbone": {"gn"}, "fpn": {"gn"}, "head": {"bn"}}
    assert network(torch.stack(images())).shape[:2] == (2, 8)


# --- a policy's encoder, as in diffusion policies -------------------------------------------------------------------


class SpatialSoftmax(nn.Module):
    """Where each channel is high, as coordinates in [-1, 1]: (N, C, H, W) to (N, 2 C). Finn et al. 2016."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weights = x.reshape(n, c, h * w).softmax(-1).reshape(n, c, h, w)
        rows, columns = torch.linspace(-1, 1, h), torch.linspace(-1, 1, w)
        return torch.cat([(weights.sum(3) * rows).sum(-1), (weights.sum(2) * columns).sum(-1)], dim=1)


class Policy(nn.Module):
    """An encoder of images (a ResNet without its end, spatial softmax, a linear layer) and what acts on it."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb_encoder = nn.Module()
        self.rgb_encoder.backbone = nn.Sequential(*list(models.resnet18(weights=None).children())[:-2])
        self.pool, self.out, self.act = SpatialSoftmax(), nn.Linear(1024, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(torch.relu(self.out(self.pool(self.rgb_encoder.backbone(x)))))


@pytest.fixture
def policy() -> nn.Module:
    torch.manual_seed(0)
    return convert(worn(Policy()), backbone="gn", channels_per_group=16)


def test_a_policys_encoder_keeps_its_samples_apart_also_in_training(policy: nn.Module) -> None:
    assert how(policy) == {"fold"}
    x = torch.stack(images())
    policy.train()
    with torch.no_grad():
        assert relative(policy(x), torch.cat([policy(x[:1]), policy(x[1:])])) < 1e-5
        trained = policy(x)
        assert relative(trained, policy.eval()(x)) < 1e-6


def test_an_average_of_a_policys_weights_is_all_there_is_to_average(policy: nn.Module) -> None:
    assert not list(policy.buffers())  # running statistics are what EMA gets wrong
    ema = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ema.update_parameters(policy)  # the first one copies
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy.train()
    loss = policy(images()[0][None]).square().mean()  # a batch of one
    loss.backward()
    optimizer.step()
    ema.update_parameters(policy)
    averaged = dict(ema.module.named_parameters())
    for name, p in policy.named_parameters():
        assert torch.allclose(averaged[name], 0.9 * start[name] + 0.1 * p, atol=1e-6)
    ema.eval()
    with torch.no_grad():
        assert torch.isfinite(ema(torch.stack(images()))).all()


def test_none_of_these_libraries_is_needed_to_use_normswap_with_it() -> None:
    assert not {"detectron2", "lerobot", "mmdet"} & sys.modules.keys()
