"""What `normswap finetune` shows of a run, and the command that a run was started with."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ...display.progress import Line, duration
from ...errors import OptionError, plainly, plural
from ..arguments.config import NOT_OF_A_RUN
from ..arguments.networks import ResolvedSource
from ..terminal import flags
from ._classes import show_classes

if TYPE_CHECKING:
    from ...finetuning.output.report import FinetuneReport, Progress
    from ..terminal.render import Page


_WORST = 5
_RESULT = ("steps", "figures", "best_name", "best", "best_at", "validated_at", "task", "classes", "names", "confusion")


def options_of(ctx: typer.Context, **settled: Any) -> dict[str, Any]:
    """All that the command was asked to do, by option, with what is `settled` where the user left it to normswap.

    How it reports and whether it replaces or resumes a run is left out.
    """
    given = {name: value for name, value in ctx.params.items() if name not in NOT_OF_A_RUN}
    return {name: str(value) if isinstance(value, Path) else value for name, value in (given | settled).items()}


def keep_command(folder: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
    """Note what was asked for; a run that goes on must be asked for the same, as far as it is in `asked`.

    That is what made the network and prepares its images; the other settings are compared with the run's state. Code
    may have moved, and whether it builds the same network shows when that is loaded. Raises OptionError.
    """
    from ...files.writing import atomic
    from ...finetuning.output.layout import COMMAND

    path = folder / COMMAND
    asked = json.loads(json.dumps(asked))
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
        return
    try:
        was = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # of a run that Python started
    differing = [name for name in asked if was.get(name) != asked[name]]
    if differing == ["source"] and _may_be_the_same(was.get("source"), asked["source"]):
        return
    if differing:
        found = ", ".join(f"{name} {plainly(was.get(name))} (now {plainly(asked[name])})" for name in differing)
        raise OptionError(f"{folder} is a run with {found}", hint="Resume with the command that it began with.")


def _may_be_the_same(*sources: Mapping[str, Any] | None) -> bool:
    """Whether both are code, called with the same arguments."""
    from ...sources.spec import Source

    one, other = (None if each is None else Source.from_dict(each) for each in sources)
    return one is not None and other is not None and one.runs_code and other.runs_code and one.args == other.args


def keep_result(folder: Path, report: FinetuneReport) -> None:
    """Add what the run came to, class by class, to what was noted of its command. Raises OutputError."""
    from ...files.writing import atomic
    from ...finetuning.output.layout import COMMAND

    path = folder / COMMAND
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        noted = {}  # of a run that Python started
    values = report.to_dict()
    noted["result"] = {name: values[name] for name in _RESULT}
    with atomic(path) as temporary:
        text = json.dumps(noted, indent=2, allow_nan=False)
        temporary.write_text(
            re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text) + "\n", encoding="utf-8"
        )


class Teller:
    """Shows progress: the table of epochs above the bar, else the bar itself.

    command: noted with `keep_command` when the run has begun, None for one that goes on.
    """

    def __init__(self, bar: Line, folder: Path, command: Mapping[str, Any] | None) -> None:
        from ...finetuning.output.report import Teller as Shown

        self._show, self._folder, self._command = Shown(bar), folder, command

    def __call__(self, progress: Progress) -> None:
        if self._command is not None:
            keep_command(self._folder, self._command, resume=False)
            self._command = None
        self._show(progress)


def _figure(report: FinetuneReport, name: str, value: float) -> tuple[str, str]:
    """One figure, and what it is over."""
    kind = "validation" if name.startswith("val_") else "training"
    before = f" (before {report.before[name]:.4f})" if name in report.before else ""
    label = f"{kind} {name.removeprefix('val_')}".replace("_", " ")
    return label, f"{value:.4f}{before}, {report.over(name)}"


def show(page: Page, report: FinetuneReport, folder: Path, origin: ResolvedSource) -> None:
    """What a run came to."""
    from ...finetuning.output.layout import COMMAND

    cut = f" of {report.planned}, interrupted" if report.interrupted else ""
    facts = [
        (
            "trained",
            f"{plural(report.steps, 'step')}{cut}, {report.epochs:.3g} epoch{'s' * (report.epochs != 1)}, "
            f"global batch {report.global_batch}",
        ),
        ("speed", f"{report.samples_per_second:.3g} images/s, {duration(report.seconds)} in all"),
    ]
    facts += [] if origin.weights is None else [("from", origin.told)]
    facts += [_figure(report, name, value) for name, value in report.figures.items()]
    if report.best is not None:
        facts.append(("best", f"{report.best_name.replace('_', ' ')} {report.best:.4f} at step {report.best_at}"))
    if report.resumed_at == report.steps and not report.interrupted:
        facts[:2] = [("trained", f"nothing: the run was complete, with {plural(report.steps, 'step')}")]
    page.facts(*facts, indent=0)
    if len(report.classes) > 1:
        hidden = show_classes(page, report, _WORST)
        past = report.best_at is not None and report.best_at != report.validated_at
        told = [f"at step {report.validated_at}, not of the best network"] * past
        told += [f"{hidden} more class{'es' * (hidden != 1)} in {folder / COMMAND}"] * (hidden > 0)
        if told:
            page.line(("; ".join(told), "dim"))
        page.gap()
    for note in report.notes:
        page.line(("note: ", "dim"), flags.told(note))
    page.skipped(report.bad)
    files = (report.best_file, report.last_file, report.curves, report.matrix, report.examples)
    page.line(("Written: ", "strong"), (str(folder), "path"), ": ", ", ".join(f.name for f in files if f is not None))
    if report.interrupted:
        page.line(("Next: ", "strong"), "the same command with --resume goes on from there")
