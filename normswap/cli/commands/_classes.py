"""The classes of labelled data as `evaluate` and `finetune` show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...evaluation.report import EvaluationReport
    from ...finetuning.output.report import FinetuneReport
    from ..terminal.render import Page


def show_classes(page: Page, report: EvaluationReport | FinetuneReport, most: int | None) -> int:
    """A table of the worst, `most` of them, or with None of all in their order. Returns how many are not in it."""
    from ...finetuning.output.by_class import COUNTED, OF_CLASSES

    rows = report.classes if most is None else report.worst[:most]
    taken = report.taken_for()
    titles = ["class" if most is None else "worst classes", f">{COUNTED[report.task]}", f">{OF_CLASSES[report.task]}"]
    page.gap()
    page.table(
        [*titles, *(["most often taken for"] if taken else [])],
        (
            [
                (each.name, "path"),
                str(each.count),
                "none" if each.value is None else f"{each.value:.4f}",
                *(["{} ({})".format(*taken[each.name]) if each.name in taken else ""] if taken else []),
            ]
            for each in rows
        ),
    )
    return len(report.classes) - len(rows)
