"""`choose_groups`: as many groups as a layer bears within a budget of drift."""

from __future__ import annotations

import pytest
import torch
from helpers import contents, randomized, relative, run
from torch import Tensor, nn

import normswap
from normswap.calibration.group_count import _Trial, choose_groups
from normswap.data.photographs import crops
from normswap.errors import DataError, OptionError


class Two(nn.Module):
    """A layer whose channels differ little from image to image, and one that follows the image's brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.calm, self.norm1 = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.loud, self.norm2 = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        noise = x - x.mean((2, 3), keepdim=True)
        return self.norm1(self.calm(noise)) + self.norm2(self.loud(x))


def images(count: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, 12, 12, generator=generator)
    return noise + 2 * torch.randn(count, 1, 1, 1, generator=generator)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    model = randomized(Two())
    for norm in (model.norm1, model.norm2):
        norm.reset_running_stats()
        norm.momentum = None
    model.train()(images(200))
    return model.eval()


def chosen(model: nn.Module, budget: float) -> dict[str, int]:
    plan = choose_groups(model, normswap.plan(model, "gn"), images(), budget=budget)
    return {step.path: step.options.num_groups for step in plan.steps}


def test_a_layer_that_bears_more_gets_more_and_the_network_stays_as_it_is(net: nn.Module) -> None:
    before = contents(net)
    found = chosen(net, 0.03)
    assert found["norm1"] > found["norm2"]
    assert contents(net) == before
    assert chosen(net, 1e-6) == {"norm1": 1, "norm2": 1}
    assert chosen(net, 1e3) == {"norm1": 8, "norm2": 8}


def test_the_number_is_the_largest_whose_calibrated_layer_stays_within_the_budget(net: nn.Module) -> None:
    x = images(16)
    drift = {}
    for groups in (1, 2, 4, 8):
        gn = normswap.convert(net, rules=[("norm2", "gn"), ("*", "keep")], groups=groups)
        normswap.calibrate(gn, net, x)
        drift[groups] = relative(run(net, x), run(gn, x))
    assert list(drift.values()) == sorted(drift.values())
    for groups, larger in ((1, 2), (2, 4), (4, 8)):
        between = (drift[groups] * drift[larger]) ** 0.5
        plan = choose_groups(net, normswap.plan(net, rules=[("norm2", "gn"), ("*", "keep")]), x, budget=between)
        assert plan.steps[0].options.num_groups == groups


def test_the_plan_converts_and_other_norms_stay(net: nn.Module) -> None:
    plan = normswap.plan(net, rules=[("norm1", "frozen"), ("*", "gn")])
    made = choose_groups(net, plan, images(), budget=1e3)
    assert [step.target for step in made.steps] == ["frozen", "gn"]
    gn = normswap.convert(net, using=made)
    assert gn.norm2.num_groups == 8
    assert relative(run(net, images()), run(gn, images())) < 1.0


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), True])
def test_a_budget_is_a_positive_number(net: nn.Module, budget: float) -> None:
    with pytest.raises(OptionError, match="budget"):
        chosen(net, budget)


def test_outputs_that_do_not_compare_are_an_error(net: nn.Module) -> None:
    class Boxes(Two):
        def forward(self, x: Tensor) -> list[dict[str, Tensor]]:  # type: ignore[override]
            return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": super().forward(x).flatten()[:0]}]

    boxes = Boxes().eval()
    boxes.load_state_dict(net.state_dict())
    with pytest.raises(DataError, match="do not compare"):
        choose_groups(boxes, normswap.plan(boxes, "gn"), images())


def test_a_single_image_is_an_error(net: nn.Module) -> None:
    with pytest.raises(DataError, match="single image"):
        choose_groups(net, normswap.plan(net, "gn"), images(1))


def test_quiet_channels_count_as_the_fold_makes_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, eps=1e-2, momentum=None), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-2, 0, 8)[:, None, None, None])
    net.train()(images(200))
    net.eval()
    x, plan = images(16), normswap.plan(net, "gn", groups=1)
    assert plan.steps[0].unit
    gn = normswap.convert(net, using=plan)
    normswap.calibrate(gn, net, x)
    drift = relative(run(net, x), run(gn, x))
    trial = _Trial(net, (x,), {step.path: step for step in plan.steps}, soft=False)
    assert trial.drift(plan.steps[0], 1) == pytest.approx(drift, rel=1e-3)


def test_groups_are_chosen_without_images_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None)).eval()
    net.train()(crops(64, (24, 24), seed=5))
    net.eval()
    plan = choose_groups(net, normswap.plan(net, "gn"), "photos", budget=1e9)
    assert plan.steps[0].options.num_groups == 4
