"""Which part of a network a layer is in, and rules that say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torchvision import models

import normswap
from normswap.errors import OptionError
from normswap.inspection.roles import counted, role_in, roles_of

DETECTORS = models.list_models(module=models.detection)
SEGMENTERS = models.list_models(module=models.segmentation)


def by_role(model: nn.Module) -> Counter[str]:
    return Counter(layer.role for layer in normswap.inspect(model, feeds=False).layers)


@pytest.mark.parametrize("name", [*DETECTORS, *SEGMENTERS])
def test_the_parts_of_torchvisions_networks_are_their_own_attributes(name: str) -> None:
    with torch.device("meta"):
        model = models.get_model(name, weights=None, weights_backbone=None)
    roles = roles_of(path for path, _ in model.named_modules())
    parts = {
        "fpn": [getattr(model.backbone, part, None) for part in ("fpn", "extra")],
        "head": [getattr(model, part, None) for part in ("rpn", "roi_heads", "head", "classifier", "aux_classifier")],
    }
    inside = {m: role for role, roots in parts.items() for root in roots if root is not None for m in root.modules()}
    for path, module in model.backbone.named_modules():
        assert roles[f"backbone.{path}" if path else "backbone"] == inside.get(module, "backbone")
    for path, module in model.named_modules():
        if module in inside:
            assert roles[path] == inside[module]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        # detectron2
        (["backbone.bottom_up.res2.0.conv1.norm", "backbone.fpn_lateral2.norm", "backbone.fpn_output2.norm"],
         ["backbone", "fpn", "fpn"]),
        (["proposal_generator.rpn_head.conv.norm", "roi_heads.box_head.conv1.norm", "sem_seg_head.p2.0.norm"],
         ["head"] * 3),
        # mmdetection and mmsegmentation
        (["backbone.layer1.0.bn1", "neck.lateral_convs.0.bn", "bbox_head.cls_convs.0.gn", "decode_head.convs.0.bn",
          "auxiliary_head.convs.0.bn"], ["backbone", "fpn", "head", "head", "head"]),
        # transformers: DETR (whose transformer is what is trained on the backbone), RT-DETR, SegFormer
        (["model.backbone.model.layer1.0.bn1", "model.encoder.layers.0.norm", "model.decoder.layers.0.norm"],
         ["backbone", "head", "head"]),
        (["model.backbone.model.bn1", "model.encoder.fpn_blocks.0.conv1.norm", "model.encoder.lateral_convs.0.norm"],
         ["backbone", "fpn", "fpn"]),
        (["segformer.encoder.layer_norm.0", "decode_head.batch_norm"], ["backbone", "head"]),
        # segmentation_models_pytorch
        (["encoder.layer1.0.bn1", "decoder.blocks.0.conv1.1", "segmentation_head.0"], ["backbone", "head", "head"]),
        # EfficientDet
        (["backbone.blocks.0.0.bn1", "fpn.cell.0.fnode.0.bn", "class_net.bn_rep.0.bn"], ["backbone", "fpn", "head"]),
        # timm: what comes before the classifier is called conv_head there; a ViT's stem may be called backbone
        (["conv_stem.bn", "norm_head", "conv_head", "classifier"], ["backbone", "backbone", "backbone", "head"]),
        (["patch_embed.backbone.stem.norm", "blocks.0.norm1", "norm", "head"], ["backbone"] * 3 + ["head"]),
        # a policy: what is not the encoder is trained on it
        (["rgb_encoder.backbone.1", "unet.down.0.norm"], ["backbone", "head"]),
        (["", "0", "1"], ["backbone"] * 3),
    ],
)  # fmt: skip
def test_the_usual_names_of_other_libraries_are_known(paths: list[str], expected: list[str]) -> None:
    with_root: Iterable[str] = dict.fromkeys([*paths, "backbone" if paths[0].startswith("backbone") else ""])
    roles = roles_of(with_root)
    assert [roles[path] for path in paths] == expected


def test_a_plain_classifier_is_all_backbone_but_its_classifier() -> None:
    with torch.device("meta"):
        assert by_role(models.resnet18()) == {"backbone": 20}
        assert by_role(models.convnext_tiny()) == {"backbone": 22, "head": 1}


def detector() -> nn.Module:
    """Paths and classes as in a detector; small."""
    net = nn.Module()
    net.backbone = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    net.fpn = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    net.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    return nn.Sequential(net)


def test_rules_take_roles() -> None:
    made = normswap.plan(detector(), rules={"role:backbone": "frozen", "role:head": "gn"}, groups=2)
    assert [(s.path, s.target) for s in made.steps] == [
        ("0.backbone.1", "frozen"), ("0.head.1", "gn"), ("0.head.3", "gn"),
    ]  # fmt: skip
    assert [(k.path, k.reason) for k in made.kept] == [("0.fpn.1", "no rule")]


def test_the_first_rule_that_matches_wins_whether_role_or_path() -> None:
    rules = [("0.head.3", "keep"), ("role:head", "ln"), ("*", "frozen")]
    made = normswap.plan(detector(), rules=rules)
    assert {s.path: s.target for s in made.steps} == {"0.backbone.1": "frozen", "0.fpn.1": "frozen", "0.head.1": "ln"}
    assert [k.path for k in made.kept] == ["0.head.3"]


def test_a_plan_says_what_each_rule_matched_and_survives_json() -> None:
    made = normswap.plan(detector(), "bn", rules={"role:head": "ln"})
    assert made.meta["rules"] == [
        {"pattern": "role:head", "target": "ln", "layers": 2},
        {"pattern": "*", "target": "bn", "layers": 2},
    ]
    assert normswap.Plan.from_json(made.to_json()) == made


def test_a_role_that_matches_nothing_names_the_roles_there_are() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    with pytest.raises(OptionError, match=r"'role:fpn'\nThe layers to convert are in: backbone \(1\)"):
        normswap.plan(net, "gn", rules={"role:fpn": "frozen"})


@pytest.mark.parametrize("pattern", ["role:neck", "role:", "role:*"])
def test_a_role_that_does_not_exist_is_refused(pattern: str) -> None:
    with pytest.raises(OptionError, match="Roles are backbone, fpn, head"):
        normswap.plan(detector(), rules={pattern: "gn"})


def test_suspects_have_roles_too() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    net = nn.ModuleDict({"backbone": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "head": Odd(4)})
    made = normswap.plan(net, rules={"role:head": "keep", "role:backbone": "ln"})
    assert [k.path for k in made.kept] == ["head"]


def test_counting_keeps_the_order_of_the_network() -> None:
    assert counted(["head", "backbone", "head"]) == "backbone (1), head (2)"
    assert role_in("layer1.*") is None
