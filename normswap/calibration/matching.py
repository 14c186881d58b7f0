"""Record the original's moments, then run the converted network once and repair each norm as it is reached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.undo_record import Order, ordered
from ..data.batches import run_on
from ..errors import DataError
from ..modules.tree import device_and_dtype
from ..norms._padded import only, told_valid, valid_steps
from ..planning.plan import Step
from .balance import Spread
from .lockstep import Lockstep
from .moments import Args, Moments, moments_of, rows_of
from .norm_targets import (
    Target,
    alive,
    apply_repair,
    apply_statistics,
    bare_output,
    distance,
    first_input,
    fixed_map,
    repair,
    rewrite,
    state_of,
    statistics_of,
    statistics_output,
)
from .refit import Refit
from .report import LayerResult

SETTLED = 1e-5
MAX_PASSES = 10
BEFORE = "before "
"""Marks the place in front of a norm, where the layer before it is fitted."""


def forward(model: nn.Module, args: Args) -> Any:
    """The model's output on one batch. Raises DataError for whatever its forward raises on it."""
    return run_on(model, model, args, fewer="Take fewer images (images=).")


def thread_context(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """What a forward pass runs under in any thread: no gradients, and autocast as it is set here."""
    kind = device_and_dtype(model)[0].type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    @contextmanager
    def context() -> Iterator[None]:
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            yield

    return context


class Original:
    """What the reference gives: each norm's moments over all images, and how often each ran on each batch.

    inputs: the moments before those norms that have running statistics.
    spreads: for the targets named in `spread`, moments of each sample before the norm.
    """

    def __init__(self, targets: Sequence[Target], spread: Mapping[str, Step] | None = None) -> None:
        self.targets = [(t, t.original) for t in targets if t.original is not None]
        self.moments: dict[str, Moments] = {t.path: Moments() for t, _ in self.targets}
        self.inputs: dict[str, Moments] = {}
        self.spreads: dict[str, Spread] = {p: Spread(step.unit) for p, step in (spread or {}).items()}
        self.calls: list[Counter[str]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect while the reference runs."""
        with ExitStack() as stack:
            for target, original in self.targets:
                state = state_of(original)
                if state.has_statistics or state.tail or target.padded:
                    hook = self._input_hook(target, state.has_statistics)
                    handle = original.register_forward_pre_hook(hook, with_kwargs=True)
                else:
                    handle = original.register_forward_hook(self._output_hook(target, state.channel_dim))
                stack.callback(handle.remove)
            yield

    def reorder(self, path: str, order: Order) -> None:
        """Let the moments of a norm stand in the order of the converted network's channels."""
        moments = self.moments.get(path)
        if moments is not None and moments.count:
            mean, deviation = (ordered(t, Order("", order.rows)) for t in (moments.mean, moments.deviation))
            self.moments[path] = Moments(moments.count, mean, deviation)

    def next_batch(self) -> None:
        """Say that another batch begins."""
        self.calls.append(Counter())

    def _note(self, target: Target, moments: Moments) -> None:
        self.moments[target.path].add(moments)
        self.calls[-1][target.path] += 1

    def _output_hook(self, target: Target, channel_dim: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            self._note(target, moments_of(out, channel_dim))

        return hook

    def _input_hook(self, target: Target, has_statistics: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = first_input(args, kwargs)
            valid = valid_steps(x) if target.padded and x.dim() == 3 else None
            if not has_statistics:
                self._note(target, moments_of(only(bare_output(module, x), valid), state_of(module).channel_dim))
                return
            rows = rows_of(only(x, valid))
            inputs = rows.moments()
            self.inputs.setdefault(target.path, Moments()).add(inputs)
            self._note(target, inputs.mapped(*fixed_map(module)))
            if target.path in self.spreads:
                self.spreads[target.path].add(rows, module)

        return hook


class Matching:
    """Repairs the targets while the converted network runs on all batches in lockstep.

    A norm that runs once per forward is repaired the moment its moments are known, and its output is rewritten, so
    that what follows sees repaired values. One that runs several times (`shared`) pools its calls, which are known
    only at the end of the pass; such a network runs again until the shared norms stay as they are.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        original: Original,
        refits: Mapping[str, Refit] = MappingProxyType({}),
        step: Callable[[], None] = lambda: None,
    ) -> None:
        self._step = step
        self.targets = {t.path: t for t in targets}
        self.original = original
        self.refits = {p: r for p, r in refits.items() if all(calls[p] <= 1 for calls in original.calls)}
        self.shared = {p for calls in original.calls for p, n in calls.items() if n > 1}
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.dead: dict[str, int] = {}
        self.calls: Counter[str] = Counter()
        self.passes = 0

    def run(
        self,
        model: nn.Module,
        batches: Sequence[Args],
        keep: Callable[[int, Any], None],
        reference: nn.Module | None = None,
    ) -> None:
        """Repair everything; `keep(i, output)` gets each batch's output of the last pass.

        reference: runs along where layers are to be fitted.
        """
        self.reference = reference if self.refits else None
        while True:
            self.passes += 1
            known = set(self.shared)
            self._pass(model, batches, keep)
            unsettled = [p for p in sorted(self.shared) if self._repair_shared(p)]
            if (self.shared == known and not unsettled) or self.passes == MAX_PASSES:
                return

    def _pass(self, model: nn.Module, batches: Sequence[Args], keep: Callable[[int, Any], None]) -> None:
        self.found = {path: Moments() for path in self.targets}
        self.fixes: dict[str, tuple[Tensor, Tensor]] = {}
        self.seen: list[Counter[str]] = [Counter() for _ in batches]

        def job(i: int) -> Callable[[], None]:
            return lambda: keep(i, forward(model, batches[i]))

        jobs = [job(i) for i in range(len(batches))]
        expected = [self._expected(i) for i in range(len(batches))]
        if self.reference is not None:
            jobs += [partial(forward, self.reference, args) for args in batches]
            fitted = [{BEFORE + p for p in self.refits if self.original.calls[i][p]} for i in range(len(batches))]
            expected = [e | f for e, f in zip(expected, fitted, strict=True)] + fitted
        self.lockstep = Lockstep(jobs, expected, self._resolve, thread_context(model))
        with ExitStack() as stack:
            for path, refit in self.refits.items():
                arrive = partial(self.lockstep.arrive, BEFORE + path)
                stack.enter_context(refit.watching(lambda: self.lockstep.current, arrive, len(batches)))
            for target in self.targets.values():
                if target.statistics:
                    handle = target.norm.register_forward_pre_hook(self._input_hook(target), with_kwargs=True)
                else:
                    handle = target.norm.register_forward_hook(self._output_hook(target))
                stack.callback(handle.remove)
            self.lockstep.run()
        for seen in self.seen:
            self.calls |= seen

    def _expected(self, i: int) -> set[str]:
        if not self.original.calls:
            return set(self.targets) if self.passes == 1 else set(self.calls) - self.shared
        return set(self.original.calls[i]) - self.shared

    def _arrive(self, target: Target, moments: Moments) -> bool:
        """Add one call's moments; wait until the norm is repaired. False where it is not repaired on the fly."""
        seen = self.seen[self.lockstep.current]
        seen[target.path] += 1
        self.found[target.path].add(moments)
        if seen[target.path] > 1 or target.path in self.fixes:
            self.shared.add(target.path)
        if target.path in self.shared:
            return False
        self.lockstep.arrive(target.path)
        return True

    def _output_hook(self, target: Target) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            dim = target.state.channel_dim
            if self._arrive(target, moments_of(only(out, told_valid(module, args)), dim)):
                rewrite(out, *self.fixes[target.path], dim)

        return hook

    def _input_hook(self, target: Target) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._arrive(target, moments_of(first_input(args, kwargs), target.state.channel_dim))

        return hook

    def _resolve(self, place: str) -> None:
        if place.startswith(BEFORE):
            self.refits[place.removeprefix(BEFORE)].solve()
        else:
            self.fixes[place] = self._repair(self.targets[place])

    def _repair_shared(self, path: str) -> bool:
        """Repair a norm with several calls from a whole pass. Returns whether it had to move."""
        target, found = self.targets[path], self.found[path]
        if found.count == 0:
            return False
        before = self._error(target, found)
        if before <= SETTLED:
            self.after[path] = before
            return False
        self._repair(target)
        return True

    def _repair(self, target: Target) -> tuple[Tensor, Tensor]:
        """Set the norm's tensors by what was found. Returns k and shift for outputs made before."""
        found = self.found[target.path]
        self._step()
        if not found.finite:
            raise DataError(f"{target.path} gives NaN or Inf on the data")
        self.before.setdefault(target.path, self._error(target, found))
        unchanged = torch.ones_like(found.mean), torch.zeros_like(found.mean)
        if target.statistics:
            apply_statistics(target, found)
            if not target.match:
                self.after[target.path] = self._error(target, found)
                return unchanged
        now = statistics_output(target, found) if target.statistics else found
        wanted = self.original.moments[target.path]
        if wanted.count == 0:
            return unchanged
        self.dead[target.path] = int((~(alive(wanted) & alive(now))).sum())
        achieved = apply_repair(target, *repair(wanted, now, silence=bool(target.carriers)))
        self.after[target.path] = distance(wanted, now.mapped(*achieved))
        return achieved

    def _error(self, target: Target, found: Moments) -> float:
        if target.match:
            now = statistics_output(target, found) if target.statistics else found
            wanted = self.original.moments[target.path]
            return distance(wanted, now) if wanted.count else 0.0
        mean, var = statistics_of(target.norm)
        return distance(Moments(found.count, mean.double(), var.double() * max(found.count - 1, 1)), found)

    def results(self) -> tuple[LayerResult, ...]:
        """One entry for each norm that ran, in the order of the targets."""
        return tuple(
            LayerResult(
                path,
                target.name,
                target.state.channels,
                self.calls[path],
                self.before[path],
                self.after.get(path, self.before[path]),
                self.dead.get(path, 0),
            )
            for path, target in self.targets.items()
            if path in self.before
        )
