"""What the tests of plans share."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict
from typing import Any

import pytest
from torch import Tensor, nn

from normswap.errors import PlanError
from normswap.planning.plan import Plan, Step
from normswap.planning.planner import plan


class Widths(nn.Module):
    """BNs of 6, 48 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6)))
        self.body = nn.Sequential(OrderedDict(conv=nn.Conv2d(6, 48, 3), bn=nn.BatchNorm2d(48), act=nn.ReLU()))
        self.tail = nn.Sequential(OrderedDict(conv=nn.Conv2d(48, 64, 3), bn=nn.BatchNorm2d(64)))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(self.stem(x)))


def describe(step: Step) -> str:
    """A step's target with its options, as `gn(num_groups=32)`."""
    options = {k: v for k, v in asdict(step.options).items() if v is not None}
    return step.target + (f"({', '.join(f'{k}={v}' for k, v in options.items())})" if options else "")


def targets_of(made: Plan) -> dict[str, str]:
    return {step.path: describe(step) for step in made.steps}


def problems(*args: Any, **kwargs: Any) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan(*args, **kwargs)
    return caught.value
