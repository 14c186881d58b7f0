"""Distillation: networks with outputs of all kinds, and what is refused."""

from __future__ import annotations

import copy
import json
import math
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


class Index(Outputs):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).argmax(1)


class Points(Outputs):
    """Where its map is bright: as many points as it finds, by themselves or with scores."""

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        points = (y > y.mean() + y.std()).nonzero().float()
        return points if self.kind == "points" else {"points": points, "logits": self.scores(y.mean((2, 3)))}


class Boxes(Outputs):
    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [
            {
                "boxes": y.new_tensor([[0, 0, 4, 4]]) + y[:4].mean((1, 2)),
                "labels": torch.ones(1),
                "scores": y.mean()[None],
            }
            for y in self.body(x)
        ]


@pytest.mark.parametrize("network", [Index("map"), Points("points"), Boxes("boxes")])
def test_outputs_that_do_not_compare_leave_the_norms_inside_to_learn_from(network: nn.Module, images: Tensor) -> None:
    original = randomized(network)
    model = normswap.convert(original, "gn", groups=2, check=False)
    with pytest.raises(DataError, match="do not compare") as error:
        normswap.distil(model, original, images, features=0.0, **SHORT)
    assert "leave out features" in str(error.value)
    inner = [normswap.verify(original, model, images).worst.error]
    report = normswap.distil(model, original, images, steps=40, batch_size=8, lr=0.05, eval_data=images)
    inner.append(normswap.verify(original, model, images).worst.error)
    assert inner[1] < 0.7 * inner[0]
    assert report.eval_loss_after < report.eval_loss_before
    assert "the outputs do not compare, so the loss is that of the 1 norm inside" in report.notes


def test_outputs_of_a_length_of_their_own_are_left_out_beside_those_that_compare(images: Tensor) -> None:
    original = randomized(Points("both"))
    model = normswap.convert(original, "gn", groups=2, check=False)
    report = normswap.distil(model, original, images, steps=1, batch_size=8, eval_data=images, lr=1e-9)
    with torch.no_grad():
        p, q = ((m(images)["logits"].double() / 2).log_softmax(1) for m in (original, model))
    assert report.eval_loss_before == pytest.approx(4 * float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    assert any(note.startswith("points: of another length in each network") for note in report.notes)


class Brightest(Outputs):
    """The brightest points of each image, as many as `count` says, and its mean."""

    count = 5

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"points": y.flatten(1).topk(self.count, 1).values, "mean": y.mean((2, 3))}


def test_a_state_whose_outputs_have_come_to_differ_in_length_is_not_the_nearest(images: Tensor) -> None:
    """What of them still compares would say less than what was measured at the start."""
    original = randomized(Brightest("points"))
    model = normswap.convert(original, "gn", groups=2, check=False)

    def found(progress: Progress) -> None:
        model.count = 4 if progress.step == 11 else 5

    report = normswap.distil(model, original, images, steps=40, batch_size=8, lr=0.05, progress=found)
    losses = dict(report.eval_losses)
    assert [step for step, loss in losses.items() if math.isinf(loss)] == [12]
    assert losses[report.kept] == min(losses.values())
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert dict(written["eval_losses"]) == {step: loss for step, loss in losses.items() if step != 12}


def test_outputs_that_come_to_differ_in_length_are_told_as_that(images: Tensor) -> None:
    class Alone(Brightest):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)["points"]

    original = randomized(Alone("points"))
    model = normswap.convert(original, "gn", groups=2, check=False)
    with pytest.raises(DataError, match="have come to differ in length") as error:
        normswap.distil(model, original, images, steps=9, features=0.0, progress=lambda _: setattr(model, "count", 4))
    assert "leave out features" in str(error.value)


def test_a_pair_is_two_inputs_where_the_forward_needs_two(images: Tensor) -> None:
    class Scaled(Outputs):
        def forward(self, x: Tensor, times: Tensor) -> Tensor:
            return self.body(x) * times.view(-1, 1, 1, 1)

    original = randomized(Scaled("map"))
    model = normswap.convert(original, "gn", groups=2, check=False)
    times = torch.arange(1, len(images) + 1)
    eval_data = [(images, times)]
    report = normswap.distil(model, original, (images, times), steps=40, batch_size=8, lr=0.05, eval_data=eval_data)
    assert report.eval_loss_after < 0.7 * report.eval_loss_before


def test_another_head_is_an_error_still(model: nn.Module, images: Tensor) -> None:
    other = Classifier()
    other.head = nn.Linear(4, 7)
    with pytest.raises(DataError, match=r"the original gives \(8, 7\), the student \(8, 5\)"):
        normswap.distil(model, other, images, **SHORT)


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
