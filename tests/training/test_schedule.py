"""The learning rate of a step, against the formulas in words."""

from __future__ import annotations

import math

import pytest

from normswap.training.schedule import Schedule


@pytest.mark.parametrize(("steps", "warm"), [(100, 10), (100, 0), (40, 5)])
def test_the_rate_rises_in_equal_parts_from_one_part_and_falls_along_a_cosine(steps: int, warm: int) -> None:
    rates = [Schedule(0.4, warm, steps).at(step) for step in range(steps)]
    assert rates[:warm] == pytest.approx([0.4 * part / (warm + 1) for part in range(1, warm + 1)])
    left = steps - warm
    assert rates[warm:] == pytest.approx([0.2 * (1 + math.cos(math.pi * k / left)) for k in range(left)])
    assert max(rates) == rates[warm] == 0.4


def test_the_last_step_has_the_final_share_where_the_end_is_the_last_step() -> None:
    rates = [Schedule(2.0, 4, 49, 0.01).at(step) for step in range(50)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.02)


def test_a_single_step_has_the_whole_rate() -> None:
    assert Schedule(0.4, 0, 0, 0.01).at(0) == 0.4
