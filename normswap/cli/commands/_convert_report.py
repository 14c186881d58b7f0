"""What a conversion came to: as JSON values, and as a page."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...display.overview import CARRIED, kept_table, steps_table
from ...modules.path_ranges import local_names
from ..arguments.networks import ResolvedSource
from ..terminal import flags
from ..terminal.suggestions import building
from ._calibration_trial import Trial
from .calibrate import figures

if TYPE_CHECKING:
    from ...calibration.report import CalibrationReport
    from ...conversion.record import Check
    from ...planning.plan import Plan
    from ..terminal.render import Page

_MEANING = {
    "fold": "statistics folded into the layer before",
    "prescale": "statistics in a fixed scale and shift before the norm",
    "fuse": "norm gone into the layer before",
    "affine": "norm left as a scale and shift",
    "exact": "computes the same",
    "centre": "mean over channels taken out of what writes the norm's input",
    "estimate": "statistics estimated on images",
    "absorb": "estimated on images, norm gone into the layer before",
    "copy": "γ and β alone copied",
    "reset": "nothing carried over",
}
_REASONS = 5


@dataclass(frozen=True)
class Result:
    """What a conversion came to.

    plan: what was carried out or, if `undone`, taken back; approximate: as far as that goes for a trained network.
    check: None before it has run, and where there is nothing to check. calibration: None where it was not asked for;
    trial: what it would have gained then, None where it would have nothing to do.
    target: where the result goes; written: whether it is there. undo: whether it holds what undoes the conversion, and
    undo_bytes: how much that is. inputs: values of --input that the file does not remember. images: whether the network
    may take images, as far as its inputs are known, so that the next commands can read a folder of them.
    onward: from a converted file as it was trained, not from the original of that; the plan then begins there.
    """

    origin: ResolvedSource
    plan: Plan
    target: Path
    written: bool
    check: Check | None = None
    undone: bool = False
    approximate: bool = False
    calibration: CalibrationReport | None = None
    trial: Trial | None = None
    undo: bool = True
    undo_bytes: int = 0
    inputs: tuple[str, ...] = ()
    onward: bool = False
    images: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "network": self.origin.to_dict(),
            "output": str(self.target) if self.written else None,
            "bytes": _bytes(self.target) if self.written else None,
            "files": len(_weight_files(self.target)) if self.written else None,
            "dry_run": not self.written,
            "undone": self.undone,
            "approximate": self.approximate,
            "self_check": None if self.check is None else _self_check(self.check),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "trial": None if self.trial is None else asdict(self.trial),
            "plan": self.plan.to_dict(),
        }


def _self_check(check: Check) -> dict[str, Any]:
    return asdict(check) | {"passed": check.passed, "reason": flags.told(check.reason)}


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
        page.skipped(result.calibration.bad)
    if result.trial is not None:
        _trial(page, result.trial)
    _file(page, result)


def _trial(page: Page, trial: Trial) -> None:
    """What calibration would gain; the command comes with the others."""
    if trial.drift is not None and trial.calibrated is not None:
        page.line(
            ("Output: ", "strong"),
            (f"{trial.drift:.2g}", "bad" if trial.drift > trial.calibrated else ""),
            f" off the original's, relatively, on {trial.images} photographs; calibrated on them ",
            (f"{trial.calibrated:.2g}", "good"),
        )


def _steps(page: Page, plan: Plan) -> None:
    table = steps_table(plan.steps)
    page.table(table.columns, table.rows)


def _kept(page: Page, plan: Plan) -> None:
    if not plan.kept:
        return
    table = kept_table(plan.kept)
    page.gap()
    page.line(("Kept", "strong"))
    page.table(table.columns, table.rows)


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
        page.line("  ", (CARRIED[how][0], CARRIED[how][1]), f" {count}: {_MEANING[how]}")
        reasons = Counter(
            local_names(step.note, step.path) for step in plan.steps if step.transfer == how and step.note
        )
        for reason, times in reasons.most_common(_REASONS):
            page.line((f"    {times} because {reason}", "dim"))
    if readers := [reader.weight for step in plan.steps for reader in step.readers]:
        page.line(
            "  ", ("γ and β folded", "good"), f": gone into {plural(len(set(readers)), 'layer')} behind the norms"
        )


def _undone(page: Page, result: Result) -> None:
    from ...errors import plural

    pairs = Counter((step.target, step.source) for step in result.plan.steps)
    how = ("approximately, since the weights are trained", "bad") if result.approximate else ("bit for bit", "good")
    what = ", ".join(f"{count} {was} back to {before}" for (was, before), count in pairs.items())
    page.line((plural(len(result.plan.steps), "layer") + ": ", "strong"), what, ", ", how)


def _check(page: Page, check: Check) -> None:
    from ...errors import plural

    if check.error is None:
        page.line(("Self-check: ", "strong"), (f"not run, {flags.told(check.reason)}", "bad"))
        return
    reached = f"{check.layers} of {plural(check.total, 'layer')}"
    page.line(
        ("Self-check: ", "strong"), ("passed", "good"), f", relative error {check.error:.1e} with {reached} exercised"
    )


def _file(page: Page, result: Result) -> None:
    if not result.written:
        page.line(("Dry run: ", "strong"), "nothing was written; the result would be ", (str(result.target), "path"))
        return
    from ...errors import plural
    from ..terminal.render import size

    total = _bytes(result.target)
    undoing = f", {size(result.undo_bytes)} of it to undo the conversion (--no-undo leaves them out)"
    more = undoing if result.undo_bytes > total // 5 else ""
    shards = plural(len(_weight_files(result.target)), "file")
    much = f"{shards} and an index, {size(total)} in all" if result.target.is_dir() else size(total)
    page.line(("Written: ", "strong"), (str(result.target), "path"), f", {much}{more}")
    if result.undone:
        how = f"a plain state dict, for load_state_dict or --weights {_quoted(result.target)}"
        page.line(("Next: ", "strong"), how)
    else:
        folder = [("   (--data FOLDER: on your images)", "dim")] if result.images else []
        page.line(("Next: ", "strong"), _verifying(result), *folder)
        if result.trial is not None and not result.images:
            page.line("      normswap.calibrate(model, data=data) in Python takes data of your own")
        elif result.trial is not None:
            known = "" if result.trial.drift is None else "; or photos, synthetic"
            page.line(f"      {_calibrating(result)}", (f"   (unlabelled images{known})", "dim"))


def _bytes(target: Path) -> int:
    """Of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (target.iterdir() if target.is_dir() else [target]) if file.is_file())


def _weight_files(target: Path) -> list[Path]:
    """The file, or the shards in a folder."""
    return sorted(target.glob("*.safetensors")) if target.is_dir() else [target]


def _calibrating(result: Result) -> str:
    return " ".join(["normswap calibrate", _quoted(result.target), "--data FOLDER", *_trust(result)])


def _trust(result: Result) -> list[str]:
    return ["--trust-code"] if result.origin.source is not None and result.origin.source.runs_code else []


def _verifying(result: Result) -> str:
    """The command that compares the result with the original, which is named where the file cannot restore it."""
    source, weights = result.origin.source, result.origin.made_with
    trust = [*_trust(result), *(word for text in result.inputs for word in ("--input", shlex.quote(text)))]
    if result.onward and result.origin.file is not None:
        return " ".join(["normswap verify", _quoted(result.origin.file), _quoted(result.target), *trust])
    if result.undo or source is None or (weights is not None and weights.random and weights.given is None):
        return " ".join(["normswap verify", _quoted(result.target), *trust])
    original, *options = building(source, weights)
    return " ".join(
        ["normswap verify", shlex.quote(original), _quoted(result.target), *map(shlex.quote, options), *trust]
    )


def _quoted(path: Path) -> str:
    """As a shell takes it; a name like an option or a command gets its folder."""
    return shlex.quote(str(path) if not str(path).startswith("-") else f"./{path}")
