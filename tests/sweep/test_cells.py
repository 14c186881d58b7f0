"""Which cells there are, and what is kept of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from normswap.errors import OptionError
from normswap.sweep.cells import Cell, CellResult, cells_of, kept_results


def test_only_norms_that_take_groups_are_crossed_with_them() -> None:
    names = [cell.name for cell in cells_of(["bn", "gn", "ln"], [1, 8], [])]
    assert names == ["bn", "gn-1", "gn-8", "ln"]


def test_each_batch_size_has_every_norm() -> None:
    names = [cell.name for cell in cells_of(["bn", "gn"], ["auto"], [2, 4, 2])]
    assert names == ["bn-batch-2", "gn-auto-batch-2", "bn-batch-4", "gn-auto-batch-4"]


@pytest.mark.parametrize(
    ("norms", "groups", "sizes", "what"),
    [
        (["gn"], [0], [], "groups must be a positive integer, got 0"),
        (["gn"], [1], [0], "batch_sizes must be a positive integer, got 0"),
        ([], [1], [], r"norms takes a list, got \[\]"),
        ("gn", [1], [], "norms takes a list, got 'gn'"),
        (["gnn"], [1], [], "unknown norm 'gnn'"),
        (["fused"], [1], [2], "fused leaves no norm to train"),
    ],
)
def test_what_makes_no_sense_is_told(norms: list[str], groups: list[int], sizes: list[int], what: str) -> None:
    with pytest.raises(OptionError, match=what):
        cells_of(norms, groups, sizes)


def test_a_result_is_read_back_as_it_was_and_failed_ones_are_not(tmp_path: Path) -> None:
    good = CellResult(Cell("gn", 4, 2), 0.5, 0.6, images=8, folder=tmp_path)
    bad = CellResult(Cell("in", None, 2), error="no")
    for result in (good, bad):
        result.keep(tmp_path / result.cell.name)
    assert list(kept_results([good.cell, bad.cell, Cell("bn")], tmp_path)) == [good]


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    result = CellResult(Cell("bn"), 0.5)
    result.keep(tmp_path / "bn")
    (tmp_path / "bn" / "cell.json").write_text('{"norm": "bn"')
    assert list(kept_results([Cell("bn")], tmp_path)) == []
