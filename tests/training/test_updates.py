"""Updates: the mean gradient, limited; and nothing that is not finite becomes a weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import TrainingError
from normswap.training.schedule import Schedule
from normswap.training.snapshot import Snapshot
from normswap.training.updates import NonFinite, Updates


class Overflow(torch.autograd.Function):
    """Its input, with a gradient that is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.tensor([3.0, 4.0]))


def updates(weight: nn.Parameter, clip: float | None = None, **more: Any) -> Updates:
    return Updates(torch.optim.SGD([weight]), Schedule(0.5, 0, 100, 1.0), clip, **more)


def linear(weight: nn.Parameter, *slope: float) -> Callable[[], Tensor]:
    return lambda: (weight * torch.tensor(slope)).sum()


def overflowing(weight: nn.Parameter) -> Callable[[], Tensor]:
    return lambda: Overflow.apply(weight).sum()


def test_a_step_goes_against_the_mean_gradient_of_its_losses(weight: nn.Parameter) -> None:
    loss = updates(weight).advance([linear(weight, 1.0, 0.0), linear(weight, 3.0, 2.0)])
    assert float(loss) == (3.0 + 17.0) / 2
    assert weight.tolist() == [3.0 - 0.5 * 2.0, 4.0 - 0.5 * 1.0]
    assert weight.grad is None


def test_the_gradient_s_norm_is_limited(weight: nn.Parameter) -> None:
    updates(weight, clip=1.0).advance([linear(weight, 30.0, 40.0)])
    assert weight.tolist() == pytest.approx([3.0 - 0.5 * 0.6, 4.0 - 0.5 * 0.8])


@pytest.mark.parametrize("what", ["loss", "norm of the gradients"])
def test_what_is_not_finite_changes_nothing_and_is_named(weight: nn.Parameter, what: str) -> None:
    work = updates(weight)
    work.advance([linear(weight, 0.0, 0.0)])
    with pytest.raises(NonFinite, match=f"the {what} is inf at step 2"):
        work.advance([linear(weight, math.inf, 1.0) if what == "loss" else overflowing(weight)])
    assert weight.tolist() == [3.0, 4.0]
    assert work.whole


@pytest.mark.parametrize("what", ["loss", "norm of the gradients"])
def test_where_looking_is_put_off_a_check_finds_the_step(weight: nn.Parameter, what: str) -> None:
    work = updates(weight, prompt=False)
    for step in range(4):
        bad = linear(weight, math.inf, 1.0) if what == "loss" else overflowing(weight)
        work.advance([bad if step == 2 else linear(weight, 0.0, 0.0)])
    with pytest.raises(NonFinite, match=rf"the {what} is (inf|nan) at step 3"):
        work.check()
    work.check()


def test_steps_of_float16_that_overflow_are_left_out_until_there_are_too_many_in_a_row(weight: nn.Parameter) -> None:
    work = updates(weight, scaler=torch.amp.GradScaler("cpu"))
    for _ in range(20):
        work.advance([overflowing(weight)])
    assert weight.tolist() == [3.0, 4.0]
    work.advance([linear(weight, 1.0, 0.0)])
    assert weight.tolist() == [2.5, 4.0]
    for _ in range(20):
        work.advance([overflowing(weight)])
    with pytest.raises(NonFinite, match="at step 42"):
        work.advance([overflowing(weight)])


def test_a_loss_that_depends_on_nothing_that_trains_is_refused(weight: nn.Parameter) -> None:
    other = nn.Parameter(torch.ones(2))
    with pytest.raises(TrainingError, match="no parameter has a gradient"):
        updates(weight).advance([linear(other, 1.0, 1.0)])


def test_an_update_that_is_cut_short_is_undone_and_the_state_no_longer_whole(
    weight: nn.Parameter, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = updates(weight, good=Snapshot(lambda: {"weight": weight}))
    work.advance([linear(weight, 1.0, 0.0)])
    step = torch.optim.SGD.step

    def interrupted(self: Any, *args: Any) -> None:
        step(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work.advance([linear(weight, 1.0, 0.0)])
    work.settle()
    assert (weight.tolist(), work.step, work.whole) == ([2.5, 4.0], 1, False)


def test_after_a_restore_the_last_good_state_is_the_one_restored(weight: nn.Parameter) -> None:
    earlier = updates(weight, good=Snapshot(lambda: {"weight": weight}))
    earlier.advance([linear(weight, 1.0, 0.0)])
    state, reached = earlier.state(), weight.detach().clone()
    weight.data = torch.tensor([3.0, 4.0])
    work = updates(weight, good=Snapshot(lambda: {"weight": weight}))
    weight.data.copy_(reached)
    work.restore(state)
    work.back()
    assert (weight.tolist(), work.step) == ([2.5, 4.0], 1)


def test_going_back_to_the_state_of_the_same_step_leaves_it_whole(weight: nn.Parameter) -> None:
    work = updates(weight, good=Snapshot(lambda: {"weight": weight}))
    weight.data.fill_(math.nan)
    work.settle()
    assert (weight.tolist(), work.step, work.whole) == ([3.0, 4.0], 0, True)


class Steep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(x.flatten(1))
        return Overflow.apply(scores) if self.training else scores


def test_fine_tuning_does_not_end_in_weights_that_an_infinite_gradient_ruined() -> None:
    model = Steep()
    before = model.head.weight.tolist()
    data = torch.randn(2, 1, 2, 2), torch.tensor([0, 1])
    with pytest.raises(TrainingError, match=r"the norm of the gradients is (inf|nan) at step 1; the network is as it"):
        normswap.finetune(model, data, batch_size=2, steps=1, device="cpu", clip_grad=None)
    assert model.head.weight.tolist() == before
