"""Two conversions of a network as one, by which a file can build it: trained with `gn`, then `fused`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..modules.tree import module_at, replace_module
from ..norms._wrappers import NormSequence
from ..norms.registry import norm_named
from ..planning.plan import Plan, Step, Transfer
from .history import Calibrated
from .record import Record, attach, record_of
from .undo_record import Undo


def joined(model: nn.Module) -> bool:
    """Let a network that was converted to per-sample norms, trained, and then fused have one record of both, in place.

    It says what it would say had the first original been fused, which makes the same modules: what a fold and what
    `calibrate` put into a layer are its weights alike, and a fixed map before a norm and one in its place are one map.
    It cannot be undone. Returns whether the two conversions are such; else nothing changes.
    """
    record = record_of(model)
    first = None if record is None else record.previous
    if record is None or first is None:
        return False
    later = {step.path: step for step in record.plan.steps}
    pairs = [(step, later.pop(step.path, None) or later.pop(f"{step.path}.norm", None)) for step in first.plan.steps]
    steps = [_joined(one, other) for one, other in pairs if other is not None]
    if later or len(steps) < len(pairs) or any(step is None for step in steps):
        return False
    for step in steps:
        if step is not None and step.transfer is Transfer.AFFINE:
            _one_map(model, step)
    plan = Plan(tuple(step for step in steps if step), first.plan.kept, first.plan.transfer, first.plan.meta)
    history = [*first.history, *record.history]
    merged = replace(first, plan=plan, undo=Undo(complete=False), check=record.check, history=history)
    merged.inputs = {**first.inputs, **record.inputs}
    attach(model, merged)
    return True


def fused_after_training(record: Record) -> bool:
    """Whether the record is one of a network that was trained and then fused, as `joined` makes it.

    A fused norm takes no calibration once it is gone, so that one after a training is what has fused it.
    """
    if record.undo.complete or not any(norm_named(step.target).fuses for step in record.plan.steps):
        return False
    done = [type(entry) if isinstance(entry, Calibrated) else entry.trains for entry in record.history]
    return Calibrated in done[done.index(True) :] if True in done else False


def _joined(first: Step, second: Step) -> Step | None:
    """The step from the first original to what is there now; None where no such step makes it."""
    if not norm_named(second.target).fuses or second.readers:
        return None
    fused = replace(first, target=second.target, options=second.options, note=second.note, unit=False, zero_init=False)
    if first.transfer is Transfer.FOLD and second.transfer is Transfer.ABSORB and first.producers == second.producers:
        return replace(fused, transfer=Transfer.FUSE)
    if first.transfer is Transfer.PRESCALE and second.transfer is Transfer.ESTIMATE:
        return replace(fused, transfer=Transfer.AFFINE)
    return None


@torch.no_grad()
def _one_map(model: nn.Module, step: Step) -> None:
    """`s2 (s1 x + t1) + t2` as one scale and shift, with what a fused layer runs after it."""
    whole: Any = module_at(model, step.path)
    before, norm = whole.standardize, whole.norm
    norm.shift.copy_(norm.scale * before.shift.to(norm.scale) + norm.shift)
    norm.scale.mul_(before.scale.to(norm.scale))
    tail = {name: child for name, child in whole.named_children() if name not in ("standardize", "norm")}
    new: nn.Module = NormSequence(norm, standardize=None, tail=tail) if tail else norm
    replace_module(model, (step.path, *step.aliases), new)
