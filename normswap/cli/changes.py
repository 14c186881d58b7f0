"""What a conversion came to: as JSON values, and as a page."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .collapse import Run, collapse, local_names
from .networks import Origin

if TYPE_CHECKING:
    from ..planning import Kept, Plan, Step
    from ..selfcheck import Check
    from .render import Page

_CARRIED = {
    "fold": ("folded into the layer before", "good"),
    "prescale": ("prescaled", "bad"),
    "fuse": ("fused into the layer before", "good"),
    "affine": ("one scale and shift per channel left", "bad"),
    "exact": ("exact", "good"),
    "copy": ("γ and β copied", ""),
    "reset": ("reset", ""),
}
_COUNTED = {"fold": "folded", "prescale": "prescaled", "fuse": "fused", "affine": "left as scale and shift"}
_COUNTED |= {"exact": "exact", "copy": "copied", "reset": "reset"}


@dataclass(frozen=True)
class Result:
    """What a conversion came to.

    plan: what was carried out or, if `undone`, taken back; approximate: as far as that goes for a trained network.
    check: None before it has run, and where there is nothing to check. target: where the result goes; written:
    whether it is there.
    """

    origin: Origin
    plan: Plan
    target: Path
    written: bool
    check: Check | None = None
    undone: bool = False
    approximate: bool = False

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
        _summary(page, result.plan)
    if result.check is not None:
        _check(page, result.check)
    _file(page, result)


def _steps(page: Page, plan: Plan) -> None:
    from .render import number_range

    runs = collapse(plan.steps, lambda s: s.path, lambda s: (s.channels, *_loose_key(s)), _loose_key)
    rows = []
    for run in runs:
        first = run.items[0]
        words, style = _CARRIED[first.transfer]
        note = f": {local_names(first.note, first.path)}" if first.note else ""
        zero = ", γ = 0" if first.zero_init else ""
        rows.append(
            (
                (run.name or "(root)", "path"),
                str(len(run.items)),
                number_range(s.channels for s in run.items),
                first.source_class,
                _target(first),
                (words + note + zero, style),
            )
        )
    page.table(("layer", ">layers", ">channels", "was", "becomes", "its statistics"), rows)


def _loose_key(step: Step) -> tuple[Hashable, ...]:
    note = local_names(step.note, step.path)
    return (step.source_class, _target(step), step.transfer, note, step.zero_init)


def _target(step: Step) -> str:
    options = {k: v for k, v in asdict(step.options).items() if v is not None}
    parts = [f"{options.pop('num_groups')} groups"] if "num_groups" in options else []
    parts += [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in options.items()]
    return step.target + (f" ({', '.join(parts)})" if parts else "")


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
    from .render import plural

    pairs = Counter((step.source, step.target) for step in plan.steps)
    carried = Counter(_COUNTED[step.transfer] for step in plan.steps)
    page.line(
        (plural(len(plan.steps), "layer") + ": ", "strong"),
        ", ".join(f"{count} {was} to {becomes}" for (was, becomes), count in pairs.items()),
        "; ",
        ", ".join(f"{count} {how}" for how, count in carried.items()),
        *([f"; {len(plan.kept)} kept"] if plan.kept else []),
    )


def _undone(page: Page, result: Result) -> None:
    from .render import plural

    pairs = Counter((step.target, step.source) for step in result.plan.steps)
    how = ("approximately, since the weights are trained", "bad") if result.approximate else ("bit for bit", "good")
    what = ", ".join(f"{count} {was} back to {before}" for (was, before), count in pairs.items())
    page.line((plural(len(result.plan.steps), "layer") + ": ", "strong"), what, ", ", how)


def _check(page: Page, check: Check) -> None:
    if check.error is None:
        page.line(("Self-check: ", "strong"), (f"not run, {check.reason}", "bad"))
        return
    reached = f"{check.layers} of {check.total} layers"
    page.line(
        ("Self-check: ", "strong"), ("passed", "good"), f", relative error {check.error:.1e} with {reached} exercised"
    )


def _file(page: Page, result: Result) -> None:
    if not result.written:
        page.line(("Dry run: ", "strong"), "nothing was written; the result would be ", (str(result.target), "path"))
        return
    from .render import size

    page.line(("Written: ", "strong"), (str(result.target), "path"), f", {size(result.target.stat().st_size)}")
    name = _quoted(result.target)
    if result.undone:
        page.line(("Next: ", "strong"), f"a plain state dict, for load_state_dict or --weights {name}")
    else:
        trust = " --trust-code" if result.origin.source is not None and result.origin.source.runs_code else ""
        page.line(("Next: ", "strong"), f"normswap verify {name}{trust}", ("   (--data FOLDER: on your images)", "dim"))


def _quoted(path: Path) -> str:
    """As a shell takes it; a name like an option or a command gets its folder."""
    return shlex.quote(str(path) if not str(path).startswith("-") else f"./{path}")
