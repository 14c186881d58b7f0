"""Whole detectors: converted, part by part, built on converted backbones, frozen by stage."""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from detectors import DETECTORS, FEW, SEGMENTERS, SMALL, build, images, loss_of, targets, values, worn
from helpers import fingerprint, relative
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import normswap
from normswap import detection
from normswap.detection import convert, detector, freeze_stages
from normswap.detection.backbones import levels_of
from normswap.errors import OptionError, PlanError
from normswap.sources.spec import Source
from normswap.sources.torchvision import architecture, published

QUICK = ["fasterrcnn_mobilenet_v3_large_320_fpn", "lraspp_mobilenet_v3_large"]
WITH_NORMS = [name for name in (*DETECTORS, *SEGMENTERS) if name != "ssd300_vgg16"]
TRIED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WITH_NORMS]


def kinds(network: nn.Module) -> Counter[str]:
    return Counter(layer.spec.name for layer in normswap.inspect(network, feeds=False).layers)


def by_role(network: nn.Module) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for layer in normswap.inspect(network, feeds=False).layers:
        found.setdefault(layer.role, set()).add(layer.spec.name)
    return found


# --- torchvision's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRIED)
def test_every_torchvision_network_converts_whole_and_trains(name: str) -> None:
    network = build(name)
    expected = values(network)
    before = kinds(network)
    for to in ("frozen", "fused", "gn"):
        converted = normswap.convert(network, to)
        check = converted.__dict__["_normswap"].check
        assert check.passed
        assert check.layers == check.total == before["bn"]
        left = kinds(converted)
        assert left == {kind: n for kind, n in {"gn": before["gn"]}.items() if n} | (
            {} if to == "fused" else {to: before["bn"] + (before["gn"] if to == "gn" else 0)}
        )
        if to != "gn":
            actual = values(converted)
            assert max(relative(a, b) for a, b in zip(expected, actual, strict=True)) <= 1e-4
    loss = loss_of(converted)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in converted.parameters())
    torch.optim.SGD(converted.parameters(), lr=1e-3).step()


def test_a_detector_without_any_norm_is_said_to_have_none() -> None:
    with torch.device("meta"):
        network = models.get_model("ssd300_vgg16", weights=None, weights_backbone=None)
    with pytest.raises(PlanError, match="SSD has no norm layer"):
        convert(network, "gn")


def coco_like() -> nn.Module:
    """The norms of a detector with torchvision's COCO weights: frozen, eps 0, here with variances below the usual."""
    torch.manual_seed(0)
    network = worn(resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3))
    overwrite_eps(network, 0.0)
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm2d):
            # Were 1e-5 added to the variance, the output of these channels would halve.
            module.running_var[::2] = 3e-6
            module.running_mean[::2] *= 1e-3
            module.weight[::2] *= 3e-3
    return network


@pytest.mark.parametrize("to", ["frozen", "fused", "bn"])
def test_the_eps_0_of_coco_weights_is_kept_by_what_computes_the_same(to: str) -> None:
    network = coco_like()
    batch = torch.stack(images())
    converted = normswap.convert(network, to)
    pairs = zip(network(batch).values(), converted(batch).values(), strict=True)
    assert max(relative(a, b) for a, b in pairs) <= 1e-4
    left = {layer.state.eps for layer in normswap.inspect(converted, feeds=False).layers}
    assert left == (set() if to == "fused" else {0.0})


def test_the_eps_0_of_coco_weights_goes_into_the_fold() -> None:
    network = coco_like()
    converted = normswap.convert(network, "gn", groups=8)
    assert converted.__dict__["_normswap"].check.passed
    old: Any = network.body
    new: Any = converted.body
    expected = old.conv1.weight / old.bn1.running_var.sqrt().view(-1, 1, 1, 1)
    assert torch.allclose(new.conv1.weight, expected, rtol=1e-5)


@pytest.mark.slow
def test_the_eps_0_of_coco_weights_survives_a_file(tmp_path: Path) -> None:
    entry = published("fasterrcnn_resnet50_fpn", "COCO_V1")
    source = Source("torchvision", "fasterrcnn_resnet50_fpn", SMALL | FEW, variant="COCO_V1")
    network = worn(architecture(source))
    assert entry.name == "COCO_V1"
    assert kinds(network) == {"frozen": 53}
    assert {layer.state.eps for layer in normswap.inspect(network, feeds=False).layers} == {0.0}
    converted = normswap.convert(network, "frozen")
    converted.__dict__["_normswap"].source = source.to_dict()
    normswap.save(converted, tmp_path / "a.safetensors")
    again = normswap.load(tmp_path / "a.safetensors")
    assert {layer.state.eps for layer in normswap.inspect(again, feeds=False).layers} == {0.0}
    # Weights mapped from a file lie elsewhere in memory, and a product may be summed in another order.
    assert max(relative(a, b) for a, b in zip(values(converted), values(again), strict=True)) < 1e-6


def test_the_module_is_there_without_an_import_of_its_own() -> None:
    assert normswap.detection is detection


# --- part by part -------------------------------------------------------------------------------------------------


def test_each_part_gets_its_own_norm() -> None:
    network = build("fasterrcnn_resnet50_fpn_v2")
    converted = convert(network, backbone="frozen", fpn="keep", head="gn", groups=8, check=False)
    assert by_role(converted) == {"backbone": {"frozen"}, "fpn": {"bn"}, "head": {"gn"}}


def test_to_is_for_the_parts_that_are_not_given_and_rules_come_first() -> None:
    network = models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    converted = convert(network, "frozen", head="gn", rules={"backbone.0.*": "keep"}, check=False)
    assert by_role(converted) == {"backbone": {"bn", "frozen"}, "head": {"gn"}}


def test_a_part_without_norms_is_an_error_and_changes_nothing() -> None:
    network = models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    before = fingerprint(network)
    with pytest.raises(OptionError, match=r"'role:fpn'\nThe layers to convert are in: backbone \(46\), head \(1\)"):
        convert(network, fpn="gn", inplace=True)
    assert fingerprint(network) == before


# --- building -----------------------------------------------------------------------------------------------------


class Trunk(nn.Module):
    """Three stages, strides 4, 8 and 16, of a few channels; what comes out is for its subclasses to say."""

    def __init__(self) -> None:
        super().__init__()
        stages = [(3, 16, 4), (16, 24, 2), (24, 32, 2)]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU()) for i, o, stride in stages
        )

    def maps(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Any:
        return self.maps(x)


class Named(Trunk):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict(zip(("a", "b", "c"), self.maps(x), strict=True))


class Ready(Trunk):
    """What torchvision's detectors take as it is."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (16, 24, 32))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: conv(m) for name, conv, m in zip("abc", self.same, self.maps(x), strict=True)}


def trains(network: nn.Module) -> None:
    loss = loss_of(network)
    loss.backward()
    assert torch.isfinite(loss)
    network.eval()
    with torch.no_grad():
        assert [found["boxes"].shape[1] for found in network(images())] == [4, 4]


def few(kind: str) -> dict[str, Any]:
    return SMALL | (FEW if "rcnn" in kind else {})


@pytest.mark.parametrize(
    ("kind", "heads"),
    [("fasterrcnn", 4), ("retinanet", 8), pytest.param("fcos", 8, marks=pytest.mark.slow),
     pytest.param("maskrcnn", 8, marks=pytest.mark.slow), pytest.param("keypointrcnn", 12, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_detector_on_a_converted_backbone_has_gn_where_the_paper_has_it(kind: str, heads: int) -> None:
    backbone = normswap.convert(worn(models.resnet18()), "gn", groups=8)
    network = detector(kind, backbone=backbone, num_classes=4, **few(kind))
    levels = 4 if "rcnn" in kind else 3  # two norms each: lateral and output
    assert Counter(layer.role for layer in normswap.inspect(network, feeds=False).layers) == {
        "backbone": 20, "fpn": 2 * levels, "head": heads,
    }  # fmt: skip
    assert kinds(network) == {"gn": 20 + 2 * levels + heads}
    new = [
        m for part in (network.backbone.fpn, *_heads(network)) for m in part.modules() if isinstance(m, nn.GroupNorm)
    ]
    assert {m.num_groups for m in new} == {32}
    assert network.backbone.body.conv1 is backbone.conv1  # with what it has learned
    trains(network)


def test_an_ssd_has_gn_in_the_blocks_that_make_its_smaller_maps() -> None:
    backbone = normswap.convert(worn(models.resnet18()), "gn", groups=8)
    network = detector("ssd", backbone=backbone, num_classes=4, size=96, trainable_layers=2)
    assert [level.channels for level in levels_of(network.backbone)] == [128, 256, 512, 256]
    assert kinds(network) == {"gn": 20 + 2}
    assert [m.num_groups for m in network.backbone.extra.modules() if isinstance(m, nn.GroupNorm)] == [32, 32]
    assert (network.transform.min_size, network.transform.fixed_size) == ((96,), (96, 96))
    assert not network.backbone.body.layer1[0].conv1.weight.requires_grad
    trains(network)


def test_the_anchors_of_an_ssd_have_the_sizes_asked_for_on_images_of_any_form() -> None:
    sizes = [10, 20, 40]
    network = detector("ssd", backbone=Trunk(), num_classes=4, norm=None, size=(64, 32), anchor_sizes=sizes, width=64)
    assert kinds(network) == {"bn": 3}
    assert [side * 64 for side in network.anchor_generator.scales[:-1]] == sizes
    assert network.transform([torch.rand(3, 50, 60)])[0].tensors.shape == (1, 3, 64, 32)
    trains(network)


@pytest.mark.parametrize("norm", ["gn", "bn", None])
def test_an_fcos_takes_any_width(norm: str | None) -> None:
    groups = {"groups": 4} if norm == "gn" else {}
    network = detector("fcos", backbone=Trunk(), num_classes=4, width=24, norm=norm, **groups, **few("fcos"))
    assert {m.out_channels for m in network.head.classification_head.conv if isinstance(m, nn.Conv2d)} == {24}
    trains(network)


def test_a_width_of_its_own_goes_into_pyramid_and_box_head() -> None:
    network = detector("fasterrcnn", backbone=Trunk(), num_classes=4, width=64, groups=8, **few("fasterrcnn"))
    assert {level.channels for level in levels_of(network.backbone)} == {64}
    assert [m.out_channels for m in network.roi_heads.box_head.modules() if isinstance(m, nn.Conv2d)] == [64] * 4
    trains(network)


def _heads(network: nn.Module) -> list[nn.Module]:
    return [network.head] if hasattr(network, "head") else [network.roi_heads, network.rpn]


def test_the_box_head_is_four_convolutions_and_one_layer_with_a_norm_and_torchvisions_own_without() -> None:
    with_norm = detector("fasterrcnn", backbone=Trunk(), num_classes=4, norm="bn", **few("fasterrcnn"))
    assert Counter(type(m).__name__ for m in with_norm.roi_heads.box_head.modules()) >= Counter(
        Conv2d=4, BatchNorm2d=4, Linear=1
    )
    without = detector("fasterrcnn", backbone=Trunk(), num_classes=4, norm=None, **few("fasterrcnn"))
    assert type(without.roi_heads.box_head).__name__ == "TwoMLPHead"
    assert kinds(without) == {"bn": 3}


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_no_norm_means_none_in_the_heads_of_one_stage_detectors(kind: str) -> None:
    network = detector(kind, backbone=Trunk(), num_classes=4, norm=None, **few(kind))
    assert kinds(network) == {"bn": 3}
    trains(network)


BACKBONES = {
    "resnet18": lambda: models.resnet18(),
    "mobilenet_v3_small": lambda: models.mobilenet_v3_small(),
    "vgg11_bn": lambda: models.vgg11_bn(),
    "timm resnet18": lambda: timm.create_model("resnet18", features_only=True),
    "timm mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", features_only=True),
    "list of maps": Trunk,
    "dict of maps": Named,
    "ready": Ready,
}


SLOW = ("resnet18", "vgg11_bn", "timm resnet18")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in BACKBONES])
def test_backbones_of_many_kinds_are_taken(name: str) -> None:
    backbone = BACKBONES[name]()
    own = sum(kinds(backbone).values())
    network = detector("fasterrcnn", backbone=backbone, num_classes=4, **few("fasterrcnn"))
    levels = levels_of(network.backbone)
    assert [level.stride for level in levels][:3] == [4, 8, 16]
    assert network.rpn.anchor_generator.sizes == tuple((8 * level.stride,) for level in levels)
    assert kinds(network)["gn"] == (4 if name == "ready" else 4 + 2 * (len(levels) - 1))
    assert own - kinds(network)["bn"] <= (1 if "mobile" in name else 0)
    trains(network)


def test_the_maps_are_those_at_the_end_of_each_stage() -> None:
    network = detector("fasterrcnn", backbone=models.resnet18(), num_classes=4, **few("fasterrcnn"))
    x = torch.randn(1, 3, 64, 64)
    body: Any = network.backbone.body.eval()
    expected = []
    h = body.maxpool(body.relu(body.bn1(body.conv1(x))))
    for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
        h = stage(h)
        expected.append(h)
    assert all(torch.equal(a, b) for a, b in zip(body(x).values(), expected, strict=True))


def test_sizes_of_images_and_anchors_pass_through() -> None:
    network = detector("fasterrcnn", backbone=Trunk(), num_classes=2, min_size=48, max_size=96,
                       anchor_sizes=[8, 16, 32, 64], box_detections_per_img=7)  # fmt: skip
    assert (network.transform.min_size, network.transform.max_size) == ((48,), 96)
    assert network.rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,))
    assert network.roi_heads.detections_per_img == 7
    dense = detector("retinanet", backbone=Trunk(), num_classes=2, anchor_sizes=[10, 20, 40, 80])
    assert dense.anchor_generator.sizes[0] == (10, 12, 15)  # three steps to the next octave


def test_what_the_backbone_has_learned_stays() -> None:
    backbone = normswap.convert(worn(models.resnet18()), "gn", groups=8)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters() if "fc" not in name}
    network = detector("retinanet", backbone=backbone, num_classes=2)
    after = dict(network.backbone.body.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))


class Last(Trunk):
    """Channels last, as some transformers give them."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [m.permute(0, 2, 3, 1) for m in self.maps(x)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "yolo"}, "known: fasterrcnn, maskrcnn"),
        ({"num_classes": 1}, "counts the background"),
        ({"num_classes": 2.0}, "counts the background"),
        ({"norm": "batchnorm"}, "unknown norm"),
        ({"norm": "frozen"}, "no statistics to freeze"),
        ({"norm": "ln", "groups": 4}, "groups apply to gn only"),
        ({"norm": None, "groups": 4}, "groups apply to gn only"),
        ({"groups": 7}, "256 channels do not divide into 7 groups"),
        ({"anchor_sizes": [8, 16]}, r"4 positive integers, for strides 4, 8, 16, 32"),
        ({"kind": "fcos", "anchor_sizes": [8] * 4}, "fcos has no anchors"),
        ({"kind": "ssd", "size": "large"}, "size must be one number or"),
        ({"kind": "ssd", "size": 8}, "size must be"),
        ({"kind": "ssd", "min_size": 300}, r"no option 'min_size'\nDid you mean size"),
        ({"norm": "groupnorm"}, "Did you mean gn"),
        ({"kind": "fcos", "size": 300}, "no option 'size'"),
        ({"width": 0}, "width must be a positive integer"),
        ({"backbone": Flat()}, "backbone takes a classifier with layer1"),
        ({"backbone": nn.Linear(3, 3)}, "does not run on an image"),
        ({"backbone": Last()}, "channels may be last"),
        ({"trainable_layers": 6}, "0 to 5"),
        ({"mini_size": 3}, r"no option 'mini_size'\nDid you mean min_size"),
        ({"box_roi_pool": 3}, "torchvision does not build this fasterrcnn"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], words: str) -> None:
    given = {"kind": "fasterrcnn", "backbone": Trunk(), "num_classes": 4} | options
    with pytest.raises(OptionError, match=words):
        detector(**given)


# --- freezing by stage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", range(6))
def test_stages_are_frozen_as_torchvision_freezes_them(trainable: int) -> None:
    theirs = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=trainable
    )
    ours = detector("fasterrcnn", backbone=models.resnet18(), num_classes=2, norm=None, trainable_layers=trainable)
    expected = {name: p.requires_grad for name, p in theirs.named_parameters() if name.startswith("body")}
    actual = {name: p.requires_grad for name, p in ours.backbone.named_parameters() if name.startswith("body")}
    assert actual == expected
    assert all(p.requires_grad for part in (ours.rpn, ours.roi_heads, ours.backbone.fpn) for p in part.parameters())


def test_statistics_of_frozen_stages_stay_in_training_and_the_others_move() -> None:
    network = detector("fasterrcnn", backbone=models.resnet18(), num_classes=4, trainable_layers=2, **few("fasterrcnn"))
    body: Any = network.backbone.body
    norms = {name: m for name, m in body.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = {name: m.running_mean.clone() for name, m in norms.items()}
    network.train()
    network(images(), targets())
    moved = {name for name, m in norms.items() if not torch.equal(before[name], m.running_mean)}
    assert moved == {name for name in norms if name.startswith(("layer3", "layer4"))}


def test_stages_without_torchvisions_names_are_told_by_their_strides() -> None:
    backbone = timm.create_model("mobilenetv3_small_050", features_only=True)
    reductions = [1, *backbone.feature_info.reduction()]
    assert reductions == [1, 2, 4, 8, 16, 32]
    freeze_stages(backbone, 1)
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"4", "5"}  # of `blocks`: those of stride 32


def test_a_dilated_network_is_frozen_by_the_names_of_its_stages() -> None:
    network = models.segmentation.fcn_resnet50(weights=None, weights_backbone=None)
    freeze_stages(network, 2)
    trained = {name.split(".")[0] for name, p in network.backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer3", "layer4"}
    assert all(p.requires_grad for p in network.classifier.parameters())


def test_a_backbone_whose_stages_cannot_be_told_apart_is_refused() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = Trunk()

        def forward(self, x: Tensor) -> list[Tensor]:
            return self.all(x)

    network = detector("fasterrcnn", backbone=One(), num_classes=2)
    with pytest.raises(OptionError, match="cannot be told apart"):
        freeze_stages(network, 3)
