"""What a task makes of outputs: scores, figures over several processes without starting any, pages of pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap.errors import NormswapError, OptionError
from normswap.finetuning.output.plots import _colours, _with_objects
from normswap.finetuning.tasks.classification import Accuracy
from normswap.finetuning.tasks.segmentation import Overlap
from normswap.heads.classifier import scores_of


class Processes:
    """What `total` gives each of several processes: the sums over all, call by call. The last to ask has them all."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def reduce(self) -> Callable[[Tensor], Tensor]:
        calls = iter(range(100))

        def total(value: Tensor) -> Tensor:
            number = next(calls)
            if number == len(self.given):
                self.given.append(torch.zeros_like(value))
            self.given[number] = self.given[number] + value
            return self.given[number]

        return total


def figures_of(*meters: Any) -> dict[str, float]:
    processes = Processes()
    return [meter.result(processes.reduce()) for meter in meters][-1]


@pytest.mark.parametrize("empty_first", [True, False])
def test_accuracy_counts_all_processes_also_one_without_images(empty_first: bool) -> None:
    scores, labels = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 4
    one, two, three = Accuracy(), Accuracy(), Accuracy()
    one.add(nn.Identity(), (scores[:6], labels[:6]))
    two.add(nn.Identity(), (scores[6:], labels[6:]))
    # The first process asks first here and knows of itself alone, so it must have images.
    found = figures_of(*((one, three, two) if empty_first else (one, two, three)))
    right = sum(int(scores[i].argmax()) == int(labels[i]) for i in range(9))
    assert found["val_accuracy"] == right / 9
    assert found["val_loss"] == pytest.approx(float(nn.functional.cross_entropy(scores, labels)))


def test_overlap_counts_all_processes_also_one_without_images() -> None:
    one, two = Overlap(), Overlap()
    scores = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-9.0, -9.0]])[:, :, None]  # three classes, two pixels
    one.add(nn.Identity(), ([scores], [torch.tensor([[0], [0]])]))
    found = figures_of(one, two)
    assert found["val_pixel_accuracy"] == 0.5
    assert found["val_miou"] == pytest.approx((1 / 2 + 0 / 1) / 2)  # class 2 is neither there nor predicted


def test_validation_without_torchmetrics_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(NormswapError, match=r"torchmetrics[\s\S]*pip install 'normswap\[train\]'"):
        Accuracy().add(nn.Identity(), (torch.randn(2, 3), torch.zeros(2).long()))


def test_boxes_are_drawn_around_and_masks_over_their_pixels_by_half() -> None:
    image = torch.full((3, 20, 20), 0.2)
    mask = torch.zeros(1, 20, 20, dtype=torch.uint8)
    mask[0, 8:11, 8:11] = 1
    target = {"boxes": torch.tensor([[4.0, 4.0, 15.0, 15.0]]), "labels": torch.tensor([2]), "masks": mask}
    drawn, colour = _with_objects(image, target, masked=True), _colours(3)[2] * 255
    assert drawn.shape == (3, 20, 20)
    assert (drawn[:, 4, 4:15].float() - colour[:, None]).abs().max() <= 1
    assert (drawn[:, 9, 9].float() - (51 + colour) / 2).abs().max() <= 1
    assert (drawn[:, :3] == 51).all()
    assert (drawn[:, 6, 6] == 51).all()
    assert (_with_objects(image, target, masked=False)[:, 9, 9] == 51).all()


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"logits": t}, lambda t: {"out": t, "aux": t + 1}])
def test_scores_are_found_in_what_networks_of_each_library_give(wrap: Any) -> None:
    rows, maps = torch.randn(2, 3), torch.randn(2, 3, 4, 4)
    assert scores_of(wrap(rows)) is rows
    assert scores_of(wrap(maps), per_pixel=True) is maps
    with pytest.raises(OptionError, match=r"shape \(2, 3, 4, 4\); a classifier gives"):
        scores_of(wrap(maps))
    with pytest.raises(OptionError, match="gives int; a segmentation network gives"):
        scores_of(1, per_pixel=True)
