"""Which of a network's outputs have a gradient to learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..data.batches import run_on
from ..modules.restore import is_detector

Outputs = Callable[..., Any]


def outputs_of(model: nn.Module) -> Outputs:
    """A function of forward's arguments that gives what a student can be compared by, and learn from.

    The model itself, but for torchvision's detectors, whose boxes after non-maximum suppression have no gradient: for
    them the feature maps of the backbone, and what the dense head (or the region proposal network's) makes of them.
    """
    if not (is_detector(model) and isinstance(getattr(model, "backbone", None), nn.Module)):
        return model
    network: Any = model

    def features(images: Any) -> dict[str, Any]:
        batch, _ = network.transform(list(images))
        maps = network.backbone(batch.tensors)
        maps = {"0": maps} if isinstance(maps, torch.Tensor) else maps
        head = getattr(network, "head", None) or getattr(getattr(network, "rpn", None), "head", None)
        return {"features": maps, "head": {} if head is None else head(list(maps.values()))}

    return features


def run(outputs: Outputs, model: nn.Module, args: tuple[Any, ...]) -> Any:
    """The outputs on one batch, placed where the model is. Raises DataError for whatever the forward raises on it."""
    return run_on(outputs, model, args, fewer="Take a smaller batch_size.")
