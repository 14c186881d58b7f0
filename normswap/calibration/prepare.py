"""What `calibrate` does before it matches moments: choose and balance the channels of groups, raise eps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..arguments import one_of
from ..choices import METHODS
from ..comparison.layers import parts
from ..conversion.exact_scaling import layer_digest, undo_layer
from ..conversion.history import Calibrated
from ..conversion.record import TOLERANCE, Record, record_of
from ..conversion.self_check import bare, difference, observe, watched_paths
from ..conversion.stabilize import Sizes
from ..conversion.undo_record import LayerUndo, Order, in_first_order
from ..data.batches import placed
from ..errors import Fix, OptionError, Text
from ..modules.tree import device_and_dtype, module_at
from ..norms.registry import norm_named as norm_type
from ..planning.plan import Step, Transfer
from .balance import can_balance, factors, rescale
from .grouping import regrouped
from .matching import Original
from .moments import Args
from .norm_targets import Target, state_of
from .permuting import Chain, chains_of, orders_of, permute
from .refit import Refit, refits_of

EPS = 4.0
"""Of norms that were given none: what is left of a sample's own variance then is a fifth. It kept more than 1 on every
network that was tried, after training at batch 2 too."""


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
        self.absorbed: dict[str, LayerUndo] = {}
        self.chains: list[Chain] = []
        self.example: Args = ()
        self.orders: dict[str, Order] = {} if self.undo is None else {order.path: order for order in self.undo.orders}
        balancing = method != "moments"
        free = record is not None and record.plan.meta.get("eps") == "auto"
        self.eps = eps or (EPS if balancing and eps is None else None)
        for target in self.targets:
            step = self.steps.get(target.path)
            if step is None or not step.transfer.standardizes or not norm_type(step.target).per_sample:
                continue
            if balancing and not balanced_before and self._is_original(target) and can_balance(target, step):
                self.balanced[target.path] = step
            if (
                self.eps is not None
                and (eps is not None or free or step.options.eps is None)
                and hasattr(target.norm, "eps")
            ):
                self.softened[target.path] = step

    @property
    def undoable(self) -> bool:
        """Whether the conversion can be undone, so that layers can be compared with the original's."""
        return self.undo is not None and self.undo.complete

    def _is_original(self, target: Target) -> bool:
        return target.original is not None and state_of(target.original).has_statistics

    def look(self, args: Args) -> None:
        """Find out, from a run on a few images, where channels may be put in another order."""
        record = record_of(self.model)
        several = {t.path: t for t in self.targets if t.path in self.balanced and (t.state.num_groups or 1) > 1}
        if record is not None and record.note(Sizes) is None and several:
            self.example = placed(next(parts(args, None, 2))[0], *device_and_dtype(self.model))
            steps = {path: self.balanced[path] for path in several if self.balanced[path].transfer is Transfer.FOLD}
            self.chains = chains_of(self.model, self.example, several, steps)

    def modules(self) -> list[nn.Module]:
        """Everything that calibration may change."""
        if self.balanced:
            return [self.model]
        waiting = {path: step for path, step in self.steps.items() if step.transfer.waits}
        steps = self.steps if self.method == "refit" else self.balanced | waiting
        layers = [module_at(self.model, path) for step in steps.values() for path in (*step.producers, step.path)]
        return [*(target.norm for target in self.targets), *layers]

    @torch.no_grad()
    def apply(self, original: Original) -> None:
        """Choose groups, balance and soften, from what the reference has shown; gamma follows."""
        chosen = self._regrouped(original)
        order_at = {path: order for chain, order in chosen.items() for path in chain.norms}
        for target in self.targets:
            step = self.balanced.get(target.path)
            if step is not None and original.spreads[target.path].means:
                gamma = state_of(target.original).weight if target.original is not None else None
                spread, order = original.spreads[target.path], order_at.get(target.path)
                factor = factors(spread, target, gamma, self._eps(target), order)
                self.records += rescale(self.model, target, step, factor, self.undo)
        if chosen:
            self._permute(orders_of(chosen))
        for target in self.targets:
            if target.path in self.softened:
                weight, old = target.state.weight, target.state.eps
                target.norm.__dict__["eps"] = self._eps(target)
                if weight is not None:
                    weight.mul_(((1 + self._eps(target)) / (1 + old)) ** 0.5)
            if target.path in self.orders:
                original.reorder(target.path, self.orders[target.path])
        self._keep_absorbing()
        if self.method == "refit":
            self.refits = refits_of(self.model, self.targets, self.steps, self._records(), self.orders)

    def _keep_absorbing(self) -> None:
        """Copies of the original's layers that are going to take in what is estimated."""
        records = self._records()
        for step in self.steps.values():
            for path in step.producers if step.transfer is Transfer.ABSORB else ():
                layer, record = module_at(self.model, path), records.get(path)
                original = None if record is None else undo_layer(layer, record)
                if record is not None and original is not None:
                    self.absorbed[path] = replace(record, correction=None, weight=original[0].clone())

    def _eps(self, target: Target) -> float:
        """The norm's eps as it is going to be."""
        return self.eps if target.path in self.softened and self.eps is not None else target.state.eps

    def _regrouped(self, original: Original) -> dict[Chain, Tensor]:
        """The order to put the channels of each chain in."""
        chosen = {}
        targets = {target.path: target for target in self.targets}
        for chain in self.chains:
            first = targets[chain.norms[0]]
            spreads = [original.spreads[path] for path in chain.norms]
            if all(spread.means for spread in spreads):
                groups = first.state.num_groups or 1
                chosen[chain] = regrouped([s.centred() for s in spreads], groups, self._eps(first))
        return chosen

    def _permute(self, orders: list[Order]) -> None:
        """Change the order of channels, and prove it as a conversion is: with bare norms, nothing may change.

        What is wrong, or cannot be told because the network is not the same from run to run, is taken back.
        """
        record = record_of(self.model)
        if record is None:
            return
        moved = {order.path for order in orders if order.rows is not None}
        watched = [path for path in watched_paths(self.model, record.plan) if path not in moved]
        with bare(self.model, record.plan, {}):
            before = observe(self.model, self.example, watched)
            permute(self.model, orders)
            error, _ = difference(before, observe(self.model, self.example, watched))
        if error <= TOLERANCE:
            self.orders = {order.path: order for order in orders}
        else:
            permute(self.model, orders, back=True)

    def _records(self) -> dict[str, LayerUndo]:
        """How to undo what was folded, and balanced since."""
        kept = self.undo.layers if self.undo is not None and self.undo.complete else []
        return {record.path: record for record in (*kept, *self.records, *self.absorbed.values())}

    def _now(self, undo: LayerUndo) -> LayerUndo:
        """With a digest of the layer as it is now."""
        layer = module_at(self.model, undo.path)
        return replace(undo, given=layer_digest(*in_first_order(layer, None)))

    def note(self, record: Record) -> None:
        """Let the conversion's record know the new eps, by which `load` rebuilds, and how to undo the new scales."""
        changed = self._records() | {path: self._now(undo) for path, undo in self.absorbed.items()}
        changed |= {refit.path: refit.undo() for refit in self.refits.values()}
        record.undo.orders = list(self.orders.values())
        known = {layer.path for layer in record.undo.layers}
        fitted = {refit.path for refit in self.refits.values()} - known if record.undo.complete else set()
        record.undo.layers = [changed.get(r.path, r) for r in record.undo.layers]
        record.undo.layers += [changed[path] for path in sorted(fitted)]
        steps = tuple(
            replace(s, options=replace(s.options, eps=self.eps)) if s.path in self.softened else s
            for s in record.plan.steps
        )
        record.plan = replace(record.plan, steps=steps)
