"""The classes of labelled data as `evaluate` and `finetune` show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...evaluation.report import EvaluationReport
    from ...finetuning.output.report import FinetuneReport
    from ..terminal.render import Page


def show_classes(page: Page, report: EvaluationReport | FinetuneReport, most: int | None) -> int:
    """A table of the worst, `most` of them, or with None of all in their order. Returns how many are not in it."""
    table = report.classes_table(report.task, most)
    page.gap()
    page.table(table.columns, table.rows)
    return len(report.classes) - len(table.rows)
