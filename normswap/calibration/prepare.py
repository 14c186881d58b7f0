"""What `calibrate` does before it matches moments: balance the channels of groups, raise eps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from ..arguments import one_of
from ..conversion.history import Calibrated
from ..conversion.record import Record, record_of
from ..conversion.undo_record import LayerUndo
from ..errors import Fix, OptionError, Text
from ..modules.tree import module_at
from ..norms.registry import norm_named as norm_type
from ..planning.plan import SOFT, Step
from .balance import can_balance, factors, rescale
from .matching import Original
from .norm_targets import Target, state_of
from .refit import Refit, refits_of

METHODS = ("balance", "refit", "moments")


class Preparation:
    """Which norms are balanced and softened, doing it, and what the record of the conversion must know of it.

    Only norms whose input was standardised (fold, prescale) qualify: elsewhere sizes and eps mean nothing.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target], method: str, eps: float | None) -> None:
        one_of("method", method, METHODS)
        if eps is not None and (isinstance(eps, bool) or not 0 <= eps < float("inf")):
            raise OptionError(Text(Fix("eps"), f" must be a finite number >= 0, got {eps!r}"))
        self.model, self.targets, self.method = model, list(targets), method
        record = record_of(model)
        self.undo = None if record is None else record.undo
        self.steps: dict[str, Step] = {} if record is None else {s.path: s for s in record.plan.steps}
        balanced_before = record is not None and any(
            isinstance(entry, Calibrated) and entry.balanced for entry in record.history
        )
        self.balanced: dict[str, Step] = {}
        self.softened: dict[str, Step] = {}
        self.records: list[LayerUndo] = []
        self.refits: dict[str, Refit] = {}
        balancing = method != "moments"
        self.eps = eps or (SOFT if balancing and eps is None else None)
        for target in self.targets:
            step = self.steps.get(target.path)
            if step is None or not step.transfer.standardizes or not norm_type(step.target).per_sample:
                continue
            if balancing and not balanced_before and self._is_original(target) and can_balance(target, step):
                self.balanced[target.path] = step
            if self.eps is not None and (eps is not None or step.options.eps is None) and hasattr(target.norm, "eps"):
                self.softened[target.path] = step

    def _is_original(self, target: Target) -> bool:
        return target.original is not None and state_of(target.original).has_statistics

    def modules(self) -> list[nn.Module]:
        """Everything that calibration may change."""
        steps = self.steps if self.method == "refit" else self.balanced
        layers = [module_at(self.model, path) for step in steps.values() for path in (*step.producers, step.path)]
        return [*(target.norm for target in self.targets), *layers]

    @torch.no_grad()
    def apply(self, original: Original) -> None:
        """Balance and soften, from what the reference has shown; gamma follows."""
        for target in self.targets:
            step = self.softened.get(target.path)
            if step is not None and self.eps is not None:
                weight, old = target.state.weight, target.state.eps
                target.norm.__dict__["eps"] = self.eps
                if weight is not None:
                    weight.mul_(((1 + self.eps) / (1 + old)) ** 0.5)
            step = self.balanced.get(target.path)
            if step is not None and original.spreads[target.path].means:
                gamma = state_of(target.original).weight if target.original is not None else None
                factor = factors(original.spreads[target.path], target, gamma, target.state.eps)
                self.records += rescale(self.model, target, step, factor, self.undo)

        if self.method == "refit":
            self.refits = refits_of(self.model, self.targets, self.steps, self._records())

    def _records(self) -> dict[str, LayerUndo]:
        """How to undo what was folded, and balanced since."""
        kept = self.undo.layers if self.undo is not None and self.undo.complete else []
        return {record.path: record for record in (*kept, *self.records)}

    def note(self, record: Record) -> None:
        """Let the conversion's record know the new eps, by which `load` rebuilds, and how to undo the new scales."""
        changed = self._records() | {refit.path: refit.undo() for refit in self.refits.values()}
        record.undo.layers = [changed.get(r.path, r) for r in record.undo.layers]
        steps = tuple(
            dataclasses.replace(s, options=dataclasses.replace(s.options, eps=self.eps))
            if s.path in self.softened
            else s
            for s in record.plan.steps
        )
        record.plan = dataclasses.replace(record.plan, steps=steps)
