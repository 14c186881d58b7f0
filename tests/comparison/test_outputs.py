"""Sums over outputs: against NumPy's formulas, torch's KL, and boxes counted by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normswap.comparison.before_after import BeforeAfter, before_after
from normswap.comparison.outputs import Deviation, OutputTally, are_detections, floating, matched_boxes
from normswap.errors import DataError


def tallied(a: Any, b: Any, labels: Tensor | None = None, classes: int | None = None) -> OutputTally:
    tally = OutputTally(classes)
    tally.add(a, b, labels)
    return tally


@pytest.mark.parametrize("sizes", [[40000], [1, 39999], [20001, 19999]])
def test_a_deviation_is_that_of_one_long_vector(sizes: list[int]) -> None:
    a, b = torch.randn(40000), torch.randn(40000)
    total = Deviation()
    for one, other in zip(a.split(sizes), b.split(sizes), strict=True):
        total.add(one, other)
    x, y = a.double().numpy(), b.double().numpy()
    assert total.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-6)
    assert total.largest == pytest.approx(np.abs(x - y).max(), rel=1e-6)


def test_many_values_are_summed_without_loss() -> None:
    total = Deviation()
    total.add(torch.full((3_000_001,), 0.1), torch.full((3_000_001,), 0.2))
    assert total.squares == pytest.approx(0.01 * 3_000_001, rel=1e-6)


def test_signs_and_memory_formats_do_not_matter() -> None:
    a = torch.randn(2, 3, 4, 5)
    b = (a - 1).to(memory_format=torch.channels_last)
    total = Deviation()
    total.add(a, b)
    assert total.largest == pytest.approx(1, rel=1e-6)
    assert total.squares == pytest.approx(a.numel(), rel=1e-6)


def test_a_reference_of_zeros_gives_the_absolute_error() -> None:
    total = Deviation()
    total.add(torch.zeros(4), torch.full((4,), 3.0))
    assert total.relative == 6
    assert Deviation().relative == 0


def test_infinities_on_both_sides_agree_and_nan_never_does() -> None:
    inf, nan = math.inf, math.nan

    def error(a: list[float], b: list[float]) -> float:
        total = Deviation()
        total.add(torch.tensor(a), torch.tensor(b))
        return total.relative

    assert error([3.0, 4.0, -inf], [3.0, 9.0, -inf]) == 1
    assert error([1.0, inf], [1.0, -inf]) == inf
    assert error([1.0, 2.0], [1.0, nan]) == inf
    assert error([1.0, nan], [1.0, nan]) == inf
    assert error([1e30, 0.0], [0.0, 0.0]) == 1  # its square is beyond float32


def test_half_precision_is_compared_in_float32() -> None:
    total = Deviation()
    total.add(torch.full((100,), 300.0, dtype=torch.float16), torch.full((100,), 301.0))
    assert total.squares == pytest.approx(100, rel=1e-6)
    assert total.reference == pytest.approx(300**2 * 100, rel=1e-6)


def test_agreement_and_kl_are_means_over_images_of_uneven_batches() -> None:
    a, b = torch.randn(10, 5) * 3, torch.randn(10, 5) * 3
    tally = OutputTally()
    for one, other in zip(a.split([7, 3]), b.split([7, 3]), strict=True):
        tally.add(one, other, None)
    kl = F.kl_div(b.log_softmax(1), a.log_softmax(1), reduction="batchmean", log_target=True)
    assert tally.divergence / tally.samples == pytest.approx(float(kl), rel=1e-5)
    assert tally.agreement() == np.mean(a.numpy().argmax(1) == b.numpy().argmax(1))


def test_scores_taken_in_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(3, 4, 6, 6), torch.randn(3, 4, 6, 6)
    whole = tallied({"out": a}, {"out": b})
    monkeypatch.setattr("normswap.comparison.outputs._AT_ONCE", 40)
    pieces = tallied({"out": a}, {"out": b})
    assert pieces.agreement() == whole.agreement() == float((a.argmax(1) == b.argmax(1)).double().mean())
    assert pieces.divergence == pytest.approx(whole.divergence, rel=1e-12)
    assert whole.samples == 3 * 6 * 6


def test_a_class_that_is_ruled_out_adds_nothing_to_kl() -> None:
    a = torch.tensor([[0.0, 0.0, -math.inf]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.5)
    b = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert tallied(a, b).divergence == pytest.approx(expected)
    assert tallied(b, a).divergence == math.inf


def test_nan_agrees_with_nothing_and_is_never_right() -> None:
    a = torch.eye(3)
    b = a.clone()
    b[1] = math.nan
    tally = tallied(a, b, torch.arange(3))
    assert (tally.same, tally.samples, tally.correct, tally.labelled) == (2, 3, [3, 2], 3)
    assert tally.divergence == math.inf
    assert tallied(b, b).same == 2


def test_accuracy_counts_labelled_images_alone() -> None:
    a, b = torch.eye(4), torch.eye(4).roll(1, 0)
    tally = OutputTally()
    tally.add(a, b, torch.tensor([0, 0, 2, 3]))
    tally.add(a, b, None)
    assert (tally.correct, tally.labelled, tally.samples) == ([3, 1], 4, 8)


def test_labels_of_other_classes_are_left_out_and_said() -> None:
    tally = tallied(torch.randn(4, 10), torch.randn(4, 10), torch.arange(4), classes=4)
    assert tally.labelled == 0
    assert list(tally.notes) == ["no accuracy: the data has 4 classes, the networks tell 10 apart"]


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range_are_an_error(label: int) -> None:
    with pytest.raises(DataError, match=f"has the label {label}, but the networks' classes are 0 to 2"):
        tallied(torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0, label]))


class Output(dict):  # type: ignore[type-arg]
    """As transformers' ModelOutput: a dict whose entries are attributes too."""


@dataclass
class Pair:
    scores: Tensor
    count: int
    more: tuple[Tensor, ...]


def test_floating_tensors_are_found_in_any_output() -> None:
    x, y = torch.ones(2, 3), torch.ones(2)
    whole = torch.tensor([1])
    assert floating(x).keys() == {""}
    assert floating((x, [y, whole])).keys() == {"0", "1.0"}
    assert floating(Output(logits=x, hidden=(x, y))).keys() == {"logits", "hidden.0", "hidden.1"}
    assert floating(Pair(x, 3, (y,))).keys() == {"scores", "more.0"}
    assert floating(None) == floating(whole) == floating("x") == {}


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, None), lambda x: [torch.ones(2, 4, 3, 3), x], lambda x: Output(loss=None, logits=x)],
)
def test_class_scores_are_found_in_any_output(wrap: Any) -> None:
    a, b = torch.eye(2), torch.eye(2).flip(0)
    b[0, 0] = 2.0
    tally = tallied(wrap(a), wrap(b), torch.tensor([0, 1]))
    assert (tally.samples, tally.same, tally.correct) == (2, 1, [2, 1])


@pytest.mark.parametrize(
    "out", [torch.randn(4, 1), torch.randn(4), torch.randn(2, 8, 4, 4), {"features": torch.ones(2)}]
)
def test_other_outputs_have_no_agreement(out: Any) -> None:
    tally = tallied(out, out)
    assert (tally.agreement(), tally.samples) == (None, 0)
    total = tally.total()
    assert total is not None
    assert total.relative == 0


def test_queries_of_a_detr_are_decisions() -> None:
    a = torch.randn(2, 7, 5)
    b = a.clone()
    b[0, 0] = -b[0, 0]
    tally = tallied({"logits": a, "pred_boxes": a}, {"logits": b, "pred_boxes": b})
    assert (tally.samples, tally.same) == (14, 13)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), r"first gives \(2, 3\), the second \(2, 4\)"),
        ({"x": torch.ones(2)}, {"y": torch.ones(2)}, r"first gives x \(2,\), the second y \(2,\)"),
        (torch.ones(2), None, r"the second no tensor"),
        (None, 3, "no floating tensor"),
    ],
)
def test_outputs_that_do_not_compare_are_an_error(a: Any, b: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        tallied(a, b)


def detected(*rows: tuple[float, float, float, float, int, float]) -> Mapping[str, Tensor]:
    """Rows of x1, y1, x2, y2, label, score."""
    table = torch.tensor(rows).reshape(-1, 6)
    return {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": table[:, 5]}


def test_boxes_without_area_match_nothing_and_hinder_no_match() -> None:
    flat, box = (5, 5, 5, 5, 1, 0.9), (0, 0, 10, 10, 1, 0.8)
    assert matched_boxes(detected(flat, box), detected(flat, box)) == (1, 2, 2)


def test_boxes_match_once_by_label_overlap_and_score() -> None:
    a = detected((0, 0, 10, 10, 1, 0.9), (20, 20, 30, 30, 2, 0.8), (0, 0, 10, 10, 1, 0.4))
    assert matched_boxes(a, a) == (2, 2, 2)
    assert matched_boxes(a, detected((0, 0, 10, 10, 2, 0.9))) == (0, 2, 1)  # another label
    assert matched_boxes(a, detected((0, 0, 10, 5, 1, 0.9))) == (1, 2, 1)  # half of it
    assert matched_boxes(a, detected((0, 0, 10, 4.9, 1, 0.9))) == (0, 2, 1)  # less
    assert matched_boxes(a, detected((0, 0, 10, 10, 1, 0.6), (0, 0, 10, 9, 1, 0.7))) == (1, 2, 2)  # twice the same
    assert matched_boxes(a, detected((0, 0, 10, 10, 1, 0.5))) == (0, 2, 0)  # score not over 0.5
    assert matched_boxes(a, detected()) == (0, 2, 0)
    assert matched_boxes(detected(), a) == (0, 0, 2)


def test_agreement_of_detectors_is_the_f1_over_all_images() -> None:
    box, far = (0, 0, 10, 10, 1, 0.9), (50, 50, 60, 60, 1, 0.9)
    a = [detected(box, far), detected(box), detected()]
    b = [detected(box), detected(far), detected(far)]
    assert are_detections(a)
    assert not are_detections([torch.ones(2)])
    tally = tallied(a, b)
    assert tally.boxes == [1, 3, 3]
    assert tally.agreement() == pytest.approx(2 * 1 / (2 * 1 + 2 + 2))
    assert tally.total() is None
    assert tallied([detected()], [detected()]).agreement() is None


def test_what_was_counted_becomes_figures_before_and_after() -> None:
    original, labels = torch.eye(4) * 2, torch.tensor([0, 1, 2, 0])
    before, after = OutputTally(), OutputTally()
    before.add(original, -original, labels)
    after.add(original, original.clone(), labels)
    figures = BeforeAfter(compared=4, **before_after(before, after))
    assert (figures.drift_before, figures.drift_after) == (2, 0)  # |-2x| / |x|
    assert (figures.agreement_before, figures.agreement_after) == (0, 1)
    assert (figures.accuracy_original, figures.accuracy_before, figures.accuracy_after) == (0.75, 0.25, 0.75)
    assert figures.lines()[0] == "output drift: 2 -> 0 (on 4 images)"
    assert BeforeAfter().lines() == []
