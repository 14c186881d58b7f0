"""The loop under every training, on a lesson that only counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normswap.training.engine import Engine
from normswap.training.schedule import Schedule
from normswap.training.updates import Updates

STEPS = 6


class Counting:
    """Measures after every third step, keeps after every second; stops after `last` steps."""

    def __init__(self, last: int = STEPS, cut: int | None = None) -> None:
        self.weight = nn.Parameter(torch.zeros(1))
        self.updates = Updates(torch.optim.SGD([self.weight], momentum=0.9), Schedule(0.1, 2, STEPS), None)
        self.engine = Engine(self, self.updates, STEPS)
        self.last, self.cut, self.said = last, cut, list[str]()

    def passes(self, step: int) -> list[Callable[[], Tensor]]:
        return [lambda: (self.weight - step).square().sum()]

    def stepped(self, loss: Tensor) -> None:
        self.said.append(f"step {self.engine.step}")

    def due(self, step: int) -> bool:
        return step % 3 == 0

    def measure(self, step: int) -> bool:
        if step == self.cut:
            self.last = step
            return False
        self.said.append(f"measure {step}")
        return True

    def keeps(self, step: int) -> bool:
        return step % 2 == 0

    def keep(self) -> None:
        self.said.append("keep")
        self.kept = {**self.updates.state(), "weight": self.weight.detach().clone(), "measured": self.engine.measured}

    def tell(self) -> None:
        self.said.append("tell")

    def stopping(self) -> bool:
        return self.engine.step >= self.last

    def failed(self, error: Exception, where: str) -> None:
        raise RuntimeError(where) from error

    def go_on_from(self, other: Counting) -> None:
        with torch.no_grad():
            self.weight.copy_(other.kept["weight"])
        self.updates.restore(other.kept)
        self.engine.measured = other.kept["measured"]


def test_a_run_measures_keeps_and_tells_when_each_is_due() -> None:
    lesson = Counting()
    lesson.engine.run()
    assert " ".join(lesson.said) == (
        "measure 0 keep step 1 tell step 2 keep tell step 3 measure 3 tell step 4 keep tell step 5 tell "
        "step 6 measure 6 keep tell"
    )


@pytest.mark.parametrize(("last", "cut"), [(1, None), (2, None), (3, None), (5, None), (6, 0), (6, 3), (6, 6)])
def test_a_run_stopped_anywhere_goes_on_to_the_same_weights_and_misses_no_measurement(
    last: int, cut: int | None
) -> None:
    whole, begun, after = Counting(), Counting(last, cut), Counting()
    whole.engine.run()
    begun.engine.run()
    after.go_on_from(begun)
    after.engine.run()
    assert torch.equal(after.weight, whole.weight)
    measured = [said for lesson in (begun, after) for said in lesson.said if said.startswith("measure")]
    assert measured == ["measure 0", "measure 3", "measure 6"]


@pytest.mark.parametrize(("name", "where"), [("passes", "step 1"), ("measure", "validation")])
def test_a_failure_is_handed_over_with_the_place(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Counting, step: int) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Counting, name, fail)
    with pytest.raises(RuntimeError, match=where):
        Counting().engine.run()
