"""`normswap convert` of a network whose running statistics were never updated: estimate them, or say what to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import OptionError
from ..arguments.networks import ResolvedSource
from ..arguments.preprocessing import PreprocessOverrides
from ..terminal.output import Output
from .calibrate import estimate

if TYPE_CHECKING:
    from torch import nn

    from ...planning.plan import Plan


@dataclass(frozen=True)
class Calibration:
    """What --calibrate and the options that go with it ask for."""

    data: Path
    images: int
    asked: PreprocessOverrides
    method: str


def mend_statistics(
    model: nn.Module, made: Plan, origin: ResolvedSource, wish: Calibration | None, out: Output, *, dry_run: bool
) -> None:
    """Statistics that were never updated say nothing: estimate them where there are images, else say what to do."""
    from ...conversion.preconditions import affine_moved, never_updated
    from ...norms.registry import states_in

    standardises = made.standardizes
    keeps = any(step.target == "frozen" or step.transfer.fuses for step in made.steps)
    built = not any(p.is_meta for p in model.parameters())
    if not (built and (standardises or keeps) and (count := never_updated(states_in(model)))):
        return
    if wish is not None:
        if not dry_run:
            out.step("estimating running statistics")
            report = estimate(model, origin, wish.data, wish.images, 32, wish.asked, out)
            out.note(f"the running statistics of {origin} were never updated: estimated on {report.images} images")
        return
    text = f"the running statistics of {origin} were never updated: mean 0, variance 1 in all of its {count} norms"
    ways = (
        "--calibrate FOLDER estimates them first, from images without labels. --transfer copy carries γ and β "
        "over alone, if the network is meant to be used with its statistics as they are."
    )
    named = origin.weights not in (None, "none") and not (origin.weights == "DEFAULT" and _runs_code(origin))
    named = named and origin.file is None
    if named and standardises:
        raise OptionError(text, hint=ways)
    if named or affine_moved(states_in(model)):
        out.note(f"{text}. {ways if standardises else ways.partition('. ')[0] + '.'}")


def _runs_code(origin: ResolvedSource) -> bool:
    return origin.source is not None and origin.source.runs_code
