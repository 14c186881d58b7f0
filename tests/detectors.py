"""What the tests of detectors share: small images with boxes, networks to try, and their outputs before NMS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from normswap.data import shapes, write_shapes

DETECTORS = models.list_models(module=models.detection)
SEGMENTERS = models.list_models(module=models.segmentation)
SMALL = {"min_size": 64, "max_size": 64}
# So few proposals that a step takes a moment; the layers are those of the full network.
FEW = {
    "rpn_post_nms_top_n_train": 16, "rpn_post_nms_top_n_test": 8, "box_batch_size_per_image": 8,
    "box_detections_per_img": 4,
}  # fmt: skip
_DATA = [item for item in shapes(6, size=64, seed=1) if len(item[1]["labels"])][:2]


def images() -> list[Tensor]:
    """Two of size 64."""
    return [image.clone() for image, _ in _DATA]


def targets() -> list[dict[str, Tensor]]:
    """Boxes, labels, masks and 17 keypoints for each of the images."""
    found = []
    for _, target in _DATA:
        corner = target["boxes"][:, None, :2].repeat(1, 17, 1) + 1
        keypoints = torch.cat([corner, torch.ones_like(corner[..., :1])], dim=2)
        found.append({name: target[name] for name in ("boxes", "labels", "masks")} | {"keypoints": keypoints})
    return found


def build(name: str, **options: Any) -> nn.Module:
    """One of torchvision's, for small images, with random weights and statistics; in eval mode."""
    if name in DETECTORS:
        options |= {} if name.startswith("ssd") else SMALL
        options |= FEW if "rcnn" in name else {}
    torch.manual_seed(0)
    return worn(models.get_model(name, weights=None, weights_backbone=None, num_classes=4, **options))


def worn(network: nn.Module) -> nn.Module:
    """In place: statistics, gamma and beta that are worth testing and yet let a hundred random layers pass."""
    for module in network.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.7, 1.5)
            module.weight.data.uniform_(0.5, 1.0)
            module.bias.data.normal_(0, 0.1)
    return network.eval()


def loss_of(network: nn.Module) -> Tensor:
    """One training step's loss; for a segmentation network, of its masks."""
    network.train()
    if hasattr(network, "transform"):
        return torch.stack(list(network(images(), targets()).values())).sum()
    truth = torch.stack([target["masks"].sum(0).clamp(max=1).long() for target in targets()])
    output = network(torch.stack(images()))
    return torch.stack([nn.functional.cross_entropy(scores, truth) for scores in output.values()]).sum()


@torch.no_grad()
def values(network: nn.Module) -> list[Tensor]:
    """What a network computes up to its boxes: rounding could tip which of two equal boxes is kept."""
    network.eval()
    batch = (
        torch.nn.functional.interpolate(torch.stack(images()), 320) if _needs_size(network) else torch.stack(images())
    )
    if not hasattr(network, "transform"):
        return list(network(batch).values())
    maps = list(network.backbone(batch).values())
    if hasattr(network, "head"):
        return [*maps, *network.head(maps).values()]
    scores, offsets = network.rpn.head(maps)
    heads, channels = network.roi_heads, network.backbone.out_channels
    generator = torch.Generator().manual_seed(0)
    region = torch.randn(3, channels, 14, 14, generator=generator)
    found = [*maps, *scores, *offsets, *heads.box_predictor(heads.box_head(region[:, :, :7, :7]))]
    if heads.mask_head is not None:
        found.append(heads.mask_predictor(heads.mask_head(region)))
    if heads.keypoint_head is not None:
        found.append(heads.keypoint_predictor(heads.keypoint_head(region)))
    return found


def _needs_size(network: nn.Module) -> bool:
    return type(network).__name__ == "SSD"


def shapes_folder(place: Path, size: int, *, held_out: int = 3) -> Path:
    """Boxes and masks: `train`, of 8 images, and `val`."""
    write_shapes(place / "train", 8, size=size, seed=0)
    write_shapes(place / "val", held_out, size=size, seed=1)
    return place
