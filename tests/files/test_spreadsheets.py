"""Names of strangers in CSV files."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from normswap.evaluation.matrix import write_csv
from normswap.evaluation.report import EvaluationReport
from normswap.files.spreadsheets import cell
from normswap.sweep.cells import Cell, CellResult
from normswap.sweep.report import ComparisonReport, write_tables


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_what_a_spreadsheet_would_run_gets_an_apostrophe(text: str) -> None:
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize("value", ["plain", "a=b", "", -1, -0.5, None])
def test_all_else_stays(value: object) -> None:
    assert cell(value) is value


def test_class_names_in_a_matrix_are_no_formulas(tmp_path: Path) -> None:
    names = ('=HYPERLINK("x")', "@b")
    report = EvaluationReport("classification", 2, {"accuracy": 0.5}, (), names, ((0, 0, 1), (1, 0, 1)))
    write_csv(report, tmp_path / "matrix.csv")
    rows = list(csv.reader((tmp_path / "matrix.csv").read_text().splitlines()))
    assert rows == [
        ["true \\ predicted", '\'=HYPERLINK("x")', "'@b"],
        ['\'=HYPERLINK("x")', "1", "0"],
        ["'@b", "1", "0"],
    ]


def test_errors_in_a_comparison_are_no_formulas_and_its_numbers_stay_numbers(tmp_path: Path) -> None:
    results = (CellResult(Cell("gn", 2), -0.5, error="=1+1"),)
    write_tables(ComparisonReport(results, tmp_path, 1))
    (row,) = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert (row["error"], row["accuracy"]) == ("'=1+1", "-0.5")
