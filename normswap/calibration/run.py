"""One calibration: the original observed, the network prepared and repaired, both compared before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..data.one_batch import images_in
from ..errors import Fix, Text, plural
from ..modules.restore import evaluating, undisturbed
from .fit import measured
from .footprint import Footprint, fitting, footprint_of_one, free_memory, ran_out
from .matching import Matching, Original, forward
from .moments import Args
from .norm_targets import Result, Target, restoring
from .outputs import Comparison
from .prepare import Preparation
from .report import CalibrationReport

HELD = 0.5
"""The share of free memory that calibration may take; if it needs more, fewer images run at once, then fewer at all."""

FEW = 16
"""Fewer images than these get a word of warning: a network that gives the original's outputs on them may give others on
the rest."""

FAR = 0.3
"""From this output drift on, fitting the layers anew is worth its cost."""

Given = tuple[Sequence[Args], Sequence[Tensor | None], tuple[str, ...] | None]
# Batches, labels, and the classes that the labels count, if known.


def calibrated(
    model: nn.Module,
    reference: nn.Module | None,
    targets: Sequence[Target],
    given: Given,
    options: tuple[str, float | None],
    step: Callable[[], None],
) -> tuple[Preparation, CalibrationReport]:
    """Calibrate; where memory runs out all the same, start again: fewer images at once, then fewer at all."""
    at_once, most = max(map(images_in, given[0])), sum(map(images_in, given[0]))
    while True:
        preparation = Preparation(model, targets, *options)
        try:
            with restoring(preparation.modules()):
                return preparation, _run(model, reference, preparation, given, (at_once, most), step)
        except Exception as error:
            if not ran_out(error) or most == 1:
                raise
        at_once, most = at_once // 2 or 1, most if at_once > 1 else most // 2


def _run(
    model: nn.Module,
    reference: nn.Module | None,
    preparation: Preparation,
    given: Given,
    limits: tuple[int, int],
    step: Callable[[], None],
) -> CalibrationReport:
    """limits: how many images may run at once, and how many in all, where memory allows it."""
    targets = preparation.targets
    batches, labels, classes = given
    asked = sum(map(images_in, batches))
    with _quiet(model, reference):
        one = _footprint(model, reference, preparation, batches[0])
        batches, labels, used = fitting(batches, labels, one, HELD * free_memory(model), limits)
        comparison = Comparison(batches, labels, classes, reference is not None)
        original = Original(targets, preparation.balanced)
        comparison.run("before", model)
        if reference is not None:
            _observe(original, reference, batches[:used], comparison, step)
            comparison.run("original", reference)
    preparation.look(batches[0])
    preparation.apply(original)
    with _quiet(model, reference):
        matching = Matching(targets, original, preparation.refits, step)
        matching.run(model, batches[:used], lambda i, out: comparison.keep("after", i, out), reference)
        comparison.run("after", model)
        results = [Result(target.norm) for target in targets]
    for result in results:  # leaving `_quiet` has put buffers and attributes back
        result.write()
    count = sum(map(images_in, batches[:used]))
    found = comparison.summary()
    notes = (*_notes(preparation, count, asked, found.get("drift_after") or 0), *comparison.notes)
    if original.inputs:
        norms = {t.path: t.original for t in targets if t.original is not None}
        found["distance"] = measured(norms, original.inputs, count).distance
    return CalibrationReport(count, matching.results(), passes=matching.passes, notes=notes, **found)


def _notes(preparation: Preparation, count: int, asked: int, drift: float) -> Iterator[str]:
    """What the caller should know of a calibration on `count` of the `asked` images, which left the outputs so far."""
    refit = preparation.method == "refit"
    if count < FEW:
        yield f"{plural(count, 'image')} tell{'s' * (count == 1)} little of others; {FEW} and more are better"
    if count < asked:
        less = Text("; ", Fix("method", "balance"), " takes less") if refit else ""
        yield Text(f"{count} of {asked} images used: more do not fit in memory at a time", less)
    if refit and preparation.balanced and not preparation.undoable:
        yield "the conversion kept nothing to undo it with, so no layer was fitted anew"
    if preparation.method == "balance" and preparation.balanced and drift > FAR:
        yield Text("the outputs are still far from the original's; ", Fix("method", "refit"), " comes closer")


def _footprint(model: nn.Module, reference: nn.Module | None, preparation: Preparation, args: Args) -> Footprint:
    """What one image takes. Refit runs both networks side by side and keeps a layer's input as well."""
    targets = preparation.targets
    mine = footprint_of_one(model, args, [target.norm for target in targets])
    if reference is None:
        return mine
    theirs = footprint_of_one(reference, args, [t.original for t in targets if t.original is not None])
    if preparation.method == "refit":
        return Footprint(max(mine.peak, theirs.peak), 0) + Footprint(1, 1) * (mine.kept + theirs.kept + mine.kept)
    return Footprint(max(mine.peak, theirs.peak), max(mine.kept, theirs.kept))


def _observe(
    original: Original,
    reference: nn.Module,
    batches: Sequence[Args],
    comparison: Comparison,
    step: Callable[[], None],
) -> None:
    """Run the reference over the batches."""
    with original.watching():
        for i, args in enumerate(batches):
            original.next_batch()
            comparison.keep("original", i, forward(reference, args))
            step()


@contextmanager
def _quiet(model: nn.Module, reference: nn.Module | None) -> Iterator[None]:
    """Eval mode and no gradients; what forward passes leave behind is undone."""
    with ExitStack() as stack:
        for network in (reference, model) if reference is not None else (model,):
            stack.enter_context(undisturbed(network))
            stack.enter_context(evaluating(network))
        stack.enter_context(torch.no_grad())
        yield
