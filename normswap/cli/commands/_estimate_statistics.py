"""`normswap convert` of a network whose running statistics were never updated: estimate them, or say what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import NetworkError
from ..arguments.networks import ResolvedSource
from ..terminal.output import Output
from .calibrate import Calibration, estimate

if TYPE_CHECKING:
    from torch import nn

    from ...planning.plan import Plan


def mend_statistics(
    model: nn.Module, made: Plan, origin: ResolvedSource, wish: Calibration | None, out: Output, *, dry_run: bool
) -> tuple[ResolvedSource, bool]:
    """Statistics that were never updated say nothing: estimate them where there are images, else say what to do.

    What stands in for images is made by them, and is no help.
    Returns where the network comes from now, and whether they were estimated.
    """
    from ...conversion.preconditions import affine_moved, never_updated
    from ...norms.registry import norm_named, states_in

    standardises = made.standardizes
    keeps = any(norm_named(step.target).fixed for step in made.steps)
    built = not any(p.is_meta for p in model.parameters())
    if not (built and (standardises or keeps) and (count := never_updated(states_in(model)))):
        return origin, False
    if wish is not None and not wish.stands_in:
        if not dry_run:
            out.step("estimating running statistics")
            report = estimate(model, origin, wish, out)
            out.note(f"the running statistics of {origin} were never updated: estimated on {report.images} images")
            return estimated(origin, model), True
        return origin, False
    text = f"the running statistics of {origin} were never updated: mean 0, variance 1 in all of its {count} norms"
    if wish is not None:
        text += f"; --calibrate {wish.data} is measured by these statistics, and cannot take their place"
    ways = (
        "--calibrate FOLDER estimates them first, from images without labels. --transfer copy carries γ and β "
        "over alone, if the network is meant to be used with its statistics as they are."
    )
    untrained = origin.weights is not None and origin.weights.random and not affine_moved(states_in(model))
    if wish is not None and standardises and untrained:
        raise NetworkError(
            f"{origin} has random weights and the statistics of a new network: no {wish.data} can keep anything",
            hint="Leave --calibrate out, or give trained weights: --weights FILE.",
        )
    named = origin.file is None and origin.weights is not None and not origin.weights.random
    if standardises and (named or wish is not None):
        raise NetworkError(text, hint=ways)
    if named or affine_moved(states_in(model)):
        out.note(f"{text}. {ways if standardises else ways.partition('. ')[0] + '.'}")
    return origin, False


def estimated(origin: ResolvedSource, model: nn.Module) -> ResolvedSource:
    """The origin of a network whose running statistics were estimated: they are the original's from now on."""
    from ...sources.weights import digest_of

    made = origin.made_with
    if origin.source is None or made is None:
        return origin
    name = f"{made}, with running statistics estimated on images"
    weights = replace(made, name=name, digest=digest_of(model.state_dict()))
    source = replace(origin.source, weights=weights.to_dict())
    return replace(origin, source=source, weights=origin.weights if origin.file else weights)
