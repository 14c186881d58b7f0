"""Distillation: networks with outputs of all kinds, and what is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from distilling import SHORT, Classifier
from helpers import contents, fingerprint, randomized
from torch import Tensor, nn

import normswap
from normswap.distillation.report import Progress
from normswap.errors import DataError, OptionError


class Outputs(nn.Module):
    """A network that gives several tensors."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body = kind, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.scores = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        maps = self.body(x)
        scores, count = self.scores(maps.mean((2, 3))), torch.tensor(len(x))
        if self.kind == "map":
            return maps
        return {"logits": scores, "maps": [maps], "count": count} if self.kind == "dict" else [maps, (scores, count)]


@pytest.mark.parametrize("kind", ["map", "dict", "list"])
def test_other_outputs_are_matched(kind: str, images: Tensor) -> None:
    original = randomized(Outputs(kind))
    model = normswap.convert(original, "gn", groups=4)
    seen: list[Progress] = []
    report = normswap.distil(model, original, images, steps=40, batch_size=8, lr=0.05, progress=seen.append)
    assert report.loss_last < 0.7 * report.loss_first
    assert report.drift_after < report.drift_before
    assert (seen[0].agreement is not None) == (kind == "dict")


def test_a_network_that_gives_nothing_to_learn_from_is_refused(images: Tensor) -> None:
    class Index(Outputs):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).argmax(1)

    model = normswap.convert(randomized(Index("map")), "gn", groups=2, check=False)
    with pytest.raises(DataError, match="no floating tensor"):
        normswap.distil(model, data=images, **SHORT)


def test_a_recurrent_network_is_distilled(images: Tensor) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.lstm = nn.LSTM(4, 6, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.body(x).mean(2).movedim(1, 2))[0]

    model = normswap.convert(randomized(Reader()), "gn", groups=2)
    report = normswap.distil(model, data=images, steps=30, batch_size=8)
    assert report.loss_last < report.loss_first
    assert (model.lstm.training, model.lstm.dropout) == (False, 0.5)


class Backbone(nn.Module):
    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.a(x)
        return OrderedDict([("0", first), ("1", self.b(first))])


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn"])
def test_a_detector_learns_from_its_feature_maps(kind: str) -> None:
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    anchors = AnchorGenerator(((16,), (32,)), ((1.0,), (1.0,)))
    sizes = {"min_size": 48, "max_size": 64}
    if kind == "retinanet":
        net: nn.Module = detection.RetinaNet(Backbone(), 3, anchor_generator=anchors, **sizes)
    else:
        pool = MultiScaleRoIAlign(["0", "1"], 3, 2)
        net = detection.FasterRCNN(Backbone(), 3, rpn_anchor_generator=anchors, box_roi_pool=pool, **sizes)
    original = randomized(net)
    model = normswap.convert(original, "gn", groups=2, check=False)
    data = [[torch.rand(3, 40 + 8 * i, 56), torch.rand(3, 48, 40)] for i in range(3)]
    before = fingerprint(original)
    report = normswap.distil(model, original, data, steps=12)
    assert fingerprint(original) == before
    assert report.loss_last < report.loss_first
    assert report.drift_before is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a positive integer"),
        ({"lr": -1.0}, "lr must be a positive number"),
        ({"train": "head"}, "train must be 'all' or 'norm'"),
        ({"precision": "int8"}, "precision must be"),
        ({"seed": -1}, "seed must be"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
        ({"data": None}, "needs images"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    model: nn.Module, images: Tensor, options: dict[str, Any], message: str
) -> None:
    before = contents(model)
    with pytest.raises(OptionError, match=message):
        normswap.distil(model, **{"data": images, **options})
    assert contents(model) == before


def test_a_reference_that_shares_its_weights_is_refused(images: Tensor) -> None:
    net = randomized(Classifier())
    model = normswap.convert(copy.deepcopy(net), "gn", groups=2, inplace=True)
    shell = copy.deepcopy(net)
    shell.head = model.head
    for reference in (model, shell):
        with pytest.raises(OptionError, match="shares parameters"):
            normswap.distil(model, reference, images, **SHORT)


def test_half_precision_weights_are_refused(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(OptionError, match="bfloat16"):
        normswap.distil(model.bfloat16(), data=images, **SHORT)
