"""`normswap convert` without --calibrate: what it would gain, tried on a few crops of photographs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..arguments.networks import ResolvedSource
from ..arguments.preprocessing import PreprocessOverrides, known_inputs
from ..terminal.output import Output

if TYPE_CHECKING:
    from torch import nn

IMAGES = 13
_LARGEST = 2**30  # bytes of weights: three networks are held at a time


@dataclass(frozen=True)
class Trial:
    """How far the outputs are from the original's, relative to those: as converted, and calibrated on the same crops.

    images: how many crops; inputs: which. All None where no photographs fit the network, so that nothing was tried.
    """

    images: int | None = None
    inputs: str | None = None
    drift: float | None = None
    calibrated: float | None = None


def tried(model: nn.Module, origin: ResolvedSource, out: Output) -> Trial | None:
    """Calibrate a copy, in the fast way. None where calibrating has nothing to do, or the original is not at hand."""
    from ...calibration.calibrate import calibrate
    from ...conversion.record import record_of
    from ...modules.tree import copied
    from ...norms.registry import norm_named

    record = record_of(model)
    steps = () if record is None else record.plan.steps
    follows = any(norm_named(step.target).per_sample and step.transfer.standardizes for step in steps)
    if record is None or not follows or not record.undo.complete:
        return None
    if sum(p.numel() * p.element_size() for p in model.parameters()) > _LARGEST:
        return Trial()
    out.step("trying what calibration gains")
    try:
        copy = copied(model)
        copied_record = record_of(copy)
        if copied_record is not None:
            copied_record.inputs = {**record.inputs, **known_inputs(model, origin, PreprocessOverrides())}
        report = calibrate(copy, None, "photos", images=IMAGES, method="balance", progress=False)
    except Exception:  # no images fit, outputs do not compare, memory ran out: a trial is not to cost the conversion
        return Trial()
    if report.drift_before is None or report.drift_after is None:
        return Trial()
    return Trial(report.images, report.stand_ins, report.drift_before, report.drift_after)
