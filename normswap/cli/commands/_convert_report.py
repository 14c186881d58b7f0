"""What a conversion came to: as JSON values, and as a page."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments.networks import ResolvedSource
from ..terminal.problem_lines import Run, collapse, local_names
from ..terminal.suggestions import building
from .calibrate import figures

if TYPE_CHECKING:
    from ...calibration.report import CalibrationReport
    from ...conversion.record import Check
    from ...planning.plan import Kept, Plan, Step
    from ..terminal.render import Page

_CARRIED = {
    "fold": ("folded", "good"),
    "prescale": ("prescaled", "bad"),
    "fuse": ("fused", "good"),
    "affine": ("scale and shift left", "bad"),
    "exact": ("exact", "good"),
    "copy": ("γ and β copied", ""),
    "reset": ("reset", ""),
}
_MEANING = {
    "fold": "statistics folded into the layer before",
    "prescale": "statistics in a fixed scale and shift before the norm",
    "fuse": "norm gone into the layer before",
    "affine": "norm left as a scale and shift",
    "exact": "computes the same",
    "copy": "γ and β alone copied",
    "reset": "nothing carried over",
}
_REASONS = 5


@dataclass(frozen=True)
class Result:
    """What a conversion came to.

    plan: what was carried out or, if `undone`, taken back; approximate: as far as that goes for a trained network.
    check: None before it has run, and where there is nothing to check. calibration: None where it was not asked for.
    target: where the result goes; written: whether it is there. undo: whether it holds what undoes the conversion.
    """

    origin: ResolvedSource
    plan: Plan
    target: Path
    written: bool
    check: Check | None = None
    undone: bool = False
    approximate: bool = False
    calibration: CalibrationReport | None = None
    undo: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "network": self.origin.to_dict(),
            "output": str(self.target) if self.written else None,
            "bytes": self.target.stat().st_size if self.written else None,
            "dry_run": not self.written,
            "undone": self.undone,
            "approximate": self.approximate,
            "self_check": None if self.check is None else asdict(self.check) | {"passed": self.check.passed},
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "plan": self.plan.to_dict(),
        }


def show(page: Page, result: Result) -> None:
    """A table of what changes, what stays and why, the self-check, and where the file is."""
    if result.undone:
        _undone(page, result)
    else:
        _steps(page, result.plan)
        _kept(page, result.plan)
        page.gap()
        if result.origin.weights is not None and result.origin.file is None:
            page.line(
                ("Weights: ", "strong"), (str(result.origin.weights), "bad" if result.origin.weights.random else "")
            )
        _summary(page, result.plan)
    if result.check is not None:
        _check(page, result.check)
    if result.calibration is not None:
        page.facts(*figures(result.calibration), indent=0)
    _file(page, result)


def _steps(page: Page, plan: Plan) -> None:
    from ..terminal.render import number_range

    runs = collapse(plan.steps, lambda s: s.path, _key, _loose_key)
    rows = []
    for run in runs:
        first = run.items[0]
        words, style = _CARRIED[first.transfer]
        zero = ", γ = 0" if first.zero_init else ""
        rows.append(
            (
                (run.name or "(root)", "path"),
                str(len(run.items)),
                number_range(s.channels for s in run.items),
                first.source_class,
                _target(run.items),
                (words + zero, style),
            )
        )
    page.table(("layer", ">layers", ">channels", "was", "becomes", "statistics"), rows)


def _key(step: Step) -> tuple[Hashable, ...]:
    return (step.channels, step.options, *_loose_key(step))


def _loose_key(step: Step) -> tuple[Hashable, ...]:
    """What the layers of one row share; channels and groups may then differ."""
    return (step.source_class, step.target, step.options.eps, step.transfer, step.note == "", step.zero_init)


def _target(steps: Sequence[Step]) -> str:
    """The new norm with its options, as `gn (32 groups)`, or `gn (16 per group)` where that is what stays the same."""
    first = steps[0]
    options = {k: v for k, v in asdict(first.options).items() if v is not None}
    parts = []
    if options.pop("num_groups", None) is not None:
        parts.append(_groups([(step.channels, asdict(step.options)["num_groups"]) for step in steps]))
    parts += [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in options.items()]
    return first.target + (f" ({', '.join(parts)})" if parts else "")


def _groups(pairs: Sequence[tuple[int, int]]) -> str:
    from ...errors import plural
    from ..terminal.render import number_range

    numbers, sizes = {groups for _, groups in pairs}, {channels // groups for channels, groups in pairs}
    if len(numbers) > 1 and len(sizes) == 1:
        return f"{sizes.pop()} per group"
    return plural(numbers.pop(), "group") if len(numbers) == 1 else f"{number_range(numbers)} groups"


def _kept(page: Page, plan: Plan) -> None:
    if not plan.kept:
        return
    runs: list[Run[Kept]] = collapse(plan.kept, lambda k: k.path, lambda k: (k.norm, k.reason))
    page.gap()
    page.line(("Kept", "strong"))
    page.table(
        ("layer", ">layers", "norm", "why"),
        (((run.name or "(root)", "path"), str(len(run.items)), run.items[0].norm, run.items[0].reason) for run in runs),
    )


def _summary(page: Page, plan: Plan) -> None:
    from ...errors import plural

    pairs = Counter((step.source, step.target) for step in plan.steps)
    carried = Counter(step.transfer for step in plan.steps)
    page.line(
        (plural(len(plan.steps), "layer") + ": ", "strong"),
        ", ".join(f"{count} {was} to {becomes}" for (was, becomes), count in pairs.items()),
        *([f"; {len(plan.kept)} kept"] if plan.kept else []),
    )
    for rule in plan.meta.get("rules", ()):
        if rule["pattern"] != "*":
            page.line("  ", (rule["pattern"], "path"), f" matched {plural(rule['layers'], 'layer')}: {rule['target']}")
    for how, count in carried.items():
        page.line("  ", (_CARRIED[how][0], _CARRIED[how][1]), f" {count}: {_MEANING[how]}")
        reasons = Counter(
            local_names(step.note, step.path) for step in plan.steps if step.transfer == how and step.note
        )
        for reason, times in reasons.most_common(_REASONS):
            page.line((f"    {times} because {reason}", "dim"))


def _undone(page: Page, result: Result) -> None:
    from ...errors import plural

    pairs = Counter((step.target, step.source) for step in result.plan.steps)
    how = ("approximately, since the weights are trained", "bad") if result.approximate else ("bit for bit", "good")
    what = ", ".join(f"{count} {was} back to {before}" for (was, before), count in pairs.items())
    page.line((plural(len(result.plan.steps), "layer") + ": ", "strong"), what, ", ", how)


def _check(page: Page, check: Check) -> None:
    from ...errors import plural

    if check.error is None:
        page.line(("Self-check: ", "strong"), (f"not run, {check.reason}", "bad"))
        return
    reached = f"{check.layers} of {plural(check.total, 'layer')}"
    page.line(
        ("Self-check: ", "strong"), ("passed", "good"), f", relative error {check.error:.1e} with {reached} exercised"
    )


def _file(page: Page, result: Result) -> None:
    if not result.written:
        page.line(("Dry run: ", "strong"), "nothing was written; the result would be ", (str(result.target), "path"))
        return
    from ..terminal.render import size

    page.line(("Written: ", "strong"), (str(result.target), "path"), f", {size(result.target.stat().st_size)}")
    if result.undone:
        how = f"a plain state dict, for load_state_dict or --weights {_quoted(result.target)}"
        page.line(("Next: ", "strong"), how)
    else:
        page.line(("Next: ", "strong"), _verifying(result), ("   (--data FOLDER: on your images)", "dim"))


def _verifying(result: Result) -> str:
    """The command that compares the result with the original, which is named where the file cannot restore it."""
    source, weights = result.origin.source, result.origin.made_with
    trust = ["--trust-code"] if source is not None and source.runs_code else []
    if result.undo or source is None or (weights is not None and weights.random and weights.given is None):
        return " ".join(["normswap verify", _quoted(result.target), *trust])
    original, *options = building(source, weights)
    return " ".join(
        ["normswap verify", shlex.quote(original), _quoted(result.target), *map(shlex.quote, options), *trust]
    )


def _quoted(path: Path) -> str:
    """As a shell takes it; a name like an option or a command gets its folder."""
    return shlex.quote(str(path) if not str(path).startswith("-") else f"./{path}")
