"""Repair a converted network from a few unlabelled images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..arguments import whole
from ..comparison.outputs import OutputTally
from ..conversion.history import Calibrated
from ..conversion.record import check_order, record_of
from ..conversion.revert import revert
from ..data.batches import as_batches, images_in
from ..errors import DataError, Fix, OptionError, RevertError, Text
from ..modules.frozen_class import FrozenStatistics
from ..modules.restore import evaluating, undisturbed
from ..modules.tree import copied
from ..modules.wrappers import unwrapped
from ..norms.registry import identify
from ..planning.plan import Transfer
from .matching import Args, Matching, Original, forward, free_memory
from .norm_targets import Result, Target, restoring, targets_of
from .prepare import Preparation
from .report import CalibrationReport

HELD = 0.5
"""The share of free memory that images waiting at a norm may take; if they need more, fewer images are used."""

FAR = 0.3
"""From this output drift on, fitting the layers anew is worth its cost."""

COMPARED = 16
"""Without labels, how many images the output drift is measured on."""


def calibrate(
    model: nn.Module,
    reference: nn.Module | None = None,
    data: Any = None,
    *,
    images: int | None = None,
    batch_size: int = 64,
    method: str = "balance",
    eps: float | None = None,
) -> CalibrationReport:
    """Bring a converted network back to its original with a few unlabelled images. In place.

    gamma and beta of the converted norms are set so that every channel of their outputs has the original's mean and
    variance over all images and positions: `k = sqrt(v_ref / v_new)`, `weight' = k weight`,
    `bias' = k (bias - m_new) + m_ref`. The norms are visited in the order in which they run, each seeing repaired
    inputs. Norms with running statistics (bn, sync, renorm) get them estimated exactly over the data, every value
    weighing alike (Wu and Johnson 2021, "precise BN"); their gamma and beta are set only where the conversion could
    not carry them over. frozen and fused need nothing.

    method: "moments" does this and nothing else. "balance" (default) first re-scales the channels that enter a group
    norm by factors between 1/2 and 2 and by -1, in the layer before it, so that the group's mean and variance differ
    less from sample to sample; gamma is divided by the same factors, which a BN would not notice. It also raises
    the `eps` of norms that compute per-sample statistics to 1, where the conversion was given none: on standardised
    channels that halves how far a sample's own variance is followed (see `eps` of `convert`).
    "refit" balances, and then fits each layer in front of a norm anew, by ridge regression of the values that the
    original has there on the inputs of the converted network. It comes closer wherever it was measured, much closer in
    deep networks and with small groups, at three to five times the cost and twice the memory; `revert` stays exact,
    for a copy of the weights. Layers other than plain convolutions (1d, 2d) and linear layers are left.
    eps: another value for it, with any method; 0 leaves it as it is.

    model: from `convert` or `load`. reference: the original network; by default it is rebuilt from what the
    conversion kept. data: images without labels, anything `normswap.data.as_batches` takes; labels add accuracies to
    the report, for one more forward pass. images: use at most so many (default 256, or all of a tensor); batches may
    differ in size. batch_size: for a tensor or a dataset.

    Cost, but for "refit": one forward pass of the reference and one of the converted network over the images. What
    lies between two layers is held for all images, however small the batches; where half of the free memory does not
    take it, fewer images are used and the report says so. Norms that run several times per forward take further
    passes, until their moments stay as they are (ten at most).

    A channel that does not vary keeps its gamma; its mean is matched. A norm without gamma and beta gets them, fixed
    (`requires_grad=False`). Training flags, hooks, random state and the reference stay as they are; on an exception,
    Ctrl-C included, the model is as before.

    Raises OptionError for a reference that does not fit, or that was itself converted from a network such as the
    model, RevertError when none is given and it cannot be rebuilt, DataError for data that cannot be used, is empty,
    or is too short for running statistics.
    """
    batches, labels, classes = _collected(data, images, batch_size)
    count = sum(map(images_in, batches))
    model = unwrapped(model)
    reference = _reference(model, None if reference is None else unwrapped(reference))
    targets = targets_of(model, reference)
    _check_enough(targets, count, images)
    if not targets:
        return CalibrationReport(count, (), passes=0, notes=("frozen and fused norms need no calibration",))
    preparation = Preparation(model, targets, method, eps)
    with restoring(preparation.modules()):
        report = _run(model, reference, preparation, _Comparison(batches, labels, classes, reference is not None))
    _remember(model, report, preparation)
    return report


def estimate_statistics(
    model: nn.Module, data: Any = None, *, images: int | None = None, batch_size: int = 64
) -> CalibrationReport:
    """Estimate the running statistics of a network's batch norms from images without labels, in place.

    For a network whose statistics were never updated, or do not belong to its data, and for one whose weights have
    changed since. Exactly over all values, each layer on what the layers before it give with their new statistics
    (Wu and Johnson 2021, "precise BN"). gamma, beta and momentum stay as they are, and so do layers that `freeze`
    holds.

    data, images, batch_size: as in `calibrate`. Raises OptionError for a network without running statistics, DataError
    for data that cannot be used; on an exception, Ctrl-C included, the model is as before.
    """
    model = unwrapped(model)
    found = [(path, m, spec) for path, m in model.named_modules() if (spec := identify(m)) is not None]
    held = [(path, m, spec) for path, m, spec in found if spec.name in _MOVING and not isinstance(m, FrozenStatistics)]
    targets = [Target(path, spec.name, m, None, True, False) for path, m, spec in held if spec.read(m).has_statistics]
    if not targets:
        raise OptionError(f"{type(model).__name__} has no running statistics to estimate")
    batches, labels = _collected(data, images, batch_size)
    _check_enough(targets, sum(map(images_in, batches)), images)
    with restoring(target.norm for target in targets):
        return _run(model, None, Preparation(model, targets, "moments", None), batches, labels)


_MOVING = ("bn", "sync", "renorm")


def _run(
    model: nn.Module,
    reference: nn.Module | None,
    preparation: Preparation,
    comparison: _Comparison,
) -> CalibrationReport:
    targets, batches = preparation.targets, comparison.given
    original = Original(targets, preparation.balanced)
    used = len(batches)
    with _quiet(model, reference):
        comparison.run("before", model)
        if reference is not None:
            memory = HELD * free_memory(model) / (2 if preparation.method == "refit" else 1)
            used = _observe(original, reference, batches, comparison, memory)
            comparison.run("original", reference)
    preparation.apply(original)
    with _quiet(model, reference):
        matching = Matching(targets, original, preparation.refits)
        matching.run(model, batches[:used], lambda i, out: comparison.keep("after", i, out), reference)
        comparison.run("after", model)
        results = [Result(target.norm) for target in targets]
    for result in results:  # leaving `_quiet` has put buffers and attributes back
        result.write()
    count, given = (sum(map(images_in, b)) for b in (batches[:used], batches))
    notes = [] if count == given else [f"{count} of {given} images used: more do not fit in memory at a time"]
    found = comparison.summary()
    if preparation.method == "balance" and preparation.balanced and (found.get("drift_after") or 0) > FAR:
        notes.append(Text("the outputs are still far from the original's; ", Fix("method", "refit"), " comes closer"))
    notes += comparison.notes
    return CalibrationReport(count, matching.results(), passes=matching.passes, notes=tuple(notes), **found)


def _observe(
    original: Original, reference: nn.Module, batches: Sequence[Args], comparison: _Comparison, memory: float
) -> int:
    """Run the reference over the batches; stop where no more can be held. Returns how many batches were used."""
    with original.watching():
        for i, args in enumerate(batches):
            original.next_batch()
            comparison.keep("original", i, forward(reference, args))
            if original.held > memory:
                return i + 1
    return len(batches)


@contextmanager
def _quiet(model: nn.Module, reference: nn.Module | None) -> Iterator[None]:
    """Eval mode and no gradients; what forward passes leave behind is undone."""
    with ExitStack() as stack:
        for network in (reference, model) if reference is not None else (model,):
            stack.enter_context(undisturbed(network))
            stack.enter_context(evaluating(network))
        stack.enter_context(torch.no_grad())
        yield


def _collected(
    data: Any, images: int | None, batch_size: int
) -> tuple[list[Args], list[Tensor | None], tuple[str, ...] | None]:
    """The batches to use, the last one cut to what was asked for, in memory: both networks see the same ones.

    With their labels, and the classes that these count, if known.
    """
    if images is not None:
        whole("images", images)
    if data is None:
        raise OptionError(
            "images are needed", hint=Text(Fix("data"), " takes a tensor (N, C, H, W), or batches of them.")
        )
    most = images or (len(data) if isinstance(data, Tensor) else 256)
    batches, labels, left = [], [], most
    source = as_batches(data, batch_size, once=True)
    for args, y in source:
        part, part_y = _first(args, y, left)
        batches.append(part)
        labels.append(part_y)
        left -= images_in(part)
        if left <= 0:
            break
    return batches, labels, source.classes


def _first(args: Args, labels: Tensor | None, most: int) -> tuple[Args, Tensor | None]:
    count = images_in(args)
    if count <= most:
        return args, labels
    counted = (list, Tensor)
    part = tuple(a[:most] if isinstance(a, counted) and len(a) == count else a for a in args)
    return part, None if labels is None else labels[:most]


def _reference(model: nn.Module, reference: nn.Module | None) -> nn.Module | None:
    """The original network: the caller's, or rebuilt from what the conversion kept, where it is needed at all."""
    if reference is model:
        raise OptionError("the reference is the model itself; pass the original network")
    if reference is not None:
        check_order(model, reference)
    record = record_of(model)
    if reference is not None or record is None:
        return reference
    try:
        rebuilt = copied(model)
        return revert(rebuilt)
    except RevertError as error:
        needed = any(
            s.target not in ("frozen", "fused") and s.transfer is not Transfer.EXACT for s in record.plan.steps
        )
        if needed:
            raise RevertError(
                error.message, hint=Text("Pass the original network as ", Fix("reference"), ".")
            ) from error
        return None


def _check_enough(targets: Sequence[Target], count: int, asked: int | None) -> None:
    if asked is not None and count < asked and any(t.statistics for t in targets):
        raise DataError(
            f"running statistics were to be estimated over {asked} images, the data has {count}",
            hint=Text("Give more images, or ask for fewer: ", Fix("images", count), "."),
        )


class _Comparison:
    """Outputs of the original and of the network before and after, on the first images, or on all with labels.

    given: the batches to calibrate on; batches: those to compare on, the last of which may be a part of its own.
    classes: the names that the labels count, if known. notes: what could not be compared, once there is a summary.
    """

    def __init__(
        self,
        given: Sequence[Args],
        labels: Sequence[Tensor | None],
        classes: tuple[str, ...] | None,
        with_original: bool,
    ) -> None:
        self.labelled = with_original and all(y is not None for y in labels)
        self.enabled = with_original
        self.given, self.classes = given, classes
        self.batches = list(given) if self.labelled else _few(given, COMPARED)
        self.labels = labels if self.labelled else [None] * len(self.batches)
        self.outputs: dict[str, list[Any]] = {k: [None] * len(self.batches) for k in ("original", "before", "after")}
        self.notes: tuple[str, ...] = ()

    def keep(self, which: str, i: int, out: Any) -> None:
        """An output on the whole of batch i."""
        if self.labelled:
            self.outputs[which][i] = out
        elif i < len(self.batches):
            self.outputs[which][i] = _rows(out, images_in(self.given[i]), images_in(self.batches[i]))

    def run(self, which: str, model: nn.Module) -> None:
        """Compute the outputs that no pass has given."""
        if self.enabled:
            for i, args in enumerate(self.batches):
                if self.outputs[which][i] is None:
                    self.outputs[which][i] = forward(model, args)

    def summary(self) -> dict[str, Any]:
        """Keyword arguments for the report."""
        if not self.enabled:
            return {}
        values: dict[str, Any] = {"compared": sum(map(images_in, self.batches))}
        for which in ("before", "after"):
            tally = OutputTally(None if self.classes is None else len(self.classes))
            for one, other, y in zip(self.outputs["original"], self.outputs[which], self.labels, strict=True):
                tally.add(one, other, y)
            total = tally.total()
            values[f"drift_{which}"] = None if total is None else total.relative
            values[f"agreement_{which}"] = tally.agreement()
            if tally.labelled:
                values["accuracy_original"] = tally.correct[0] / tally.labelled
                values[f"accuracy_{which}"] = tally.correct[1] / tally.labelled
            self.notes = tuple(tally.notes)
        return values


def _few(batches: Sequence[Args], most: int) -> list[Args]:
    """The first batches, so many images in all at most."""
    found: list[Args] = []
    for args in batches:
        if most <= 0:
            break
        found.append(_first(args, None, most)[0])
        most -= images_in(found[-1])
    return found


def _rows(out: Any, size: int, wanted: int) -> Any:
    """A copy of the first rows of an output on `size` images; None if not all of its tensors count images."""
    leaves, structure = pytree.tree_flatten(out)
    if not all(isinstance(t, Tensor) and t.dim() > 0 and len(t) == size for t in leaves):
        return None
    return pytree.tree_unflatten([t[:wanted].clone() for t in leaves], structure)


def _remember(model: nn.Module, report: CalibrationReport, preparation: Preparation) -> None:
    record = record_of(model)
    if record is not None:
        preparation.note(record)
        drift = [report.drift_before, report.drift_after]
        how = (preparation.method, len(preparation.balanced), preparation.eps)
        record.history.append(Calibrated(report.images, len(report.layers), *how, drift))
