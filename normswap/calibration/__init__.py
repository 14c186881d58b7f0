"""Repair a converted network from a few unlabelled images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..agreement import OutputTally
from ..conversion import record_of
from ..data import as_batches, images_in
from ..errors import DataError, OptionError, RevertError
from ..surgery import copied, evaluating, undisturbed
from ..undo import revert
from ..values import whole
from .fit import measured
from .matching import Args, Matching, Original, forward, free_memory
from .preparation import Preparation
from .report import CalibrationReport as CalibrationReport
from .report import LayerResult as LayerResult
from .standins import KINDS, StandIns, stand_ins
from .targets import Result, Target, restoring, targets_of

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
    example_inputs: Any = None,
    seed: int = 0,
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
    the report, for one more forward pass. Or "photos": crops of photographs that come with the package; or "synthetic":
    inputs optimised from them until the original's norms see the mean and variance that they remember from training.
    These need no data; they are shaped like example_inputs, where the conversion was given none and none can be
    guessed, and drawn by seed. The report says how near the inputs come to those of the training.
    images: use at most so many (default 256, or all of a tensor); batches may differ in size. batch_size: for a tensor
    or a dataset.

    Cost, but for "refit": one forward pass of the reference and one of the converted network over the images. What
    lies between two layers is held for all images, however small the batches; where half of the free memory does not
    take it, fewer images are used and the report says so. Norms that run several times per forward take further
    passes, until their moments stay as they are (ten at most).

    A channel that does not vary keeps its gamma; its mean is matched. A norm without gamma and beta gets them, fixed
    (`requires_grad=False`). Training flags, hooks, random state and the reference stay as they are; on an exception,
    Ctrl-C included, the model is as before.

    Raises OptionError for a reference that does not fit, RevertError when none is given and it cannot be rebuilt,
    DataError for data that cannot be used, is empty, or is too short for running statistics.
    """
    reference = _reference(model, reference)
    made = _stand_ins(data, model, reference, example_inputs, images, seed)
    batches, labels = _collected(made.batches if made else data, images, batch_size)
    count = sum(map(images_in, batches))
    targets = targets_of(model, reference)
    _check_enough(targets, count, images)
    if not targets:
        return CalibrationReport(count, (), passes=0, notes=("frozen and fused norms need no calibration",))
    preparation = Preparation(model, targets, method, eps)
    with restoring(preparation.modules()):
        report = _run(model, reference, preparation, batches, labels)
    if made is not None:
        report = replace(report, stand_ins=str(made))
    _remember(model, report, preparation)
    return report


def _run(
    model: nn.Module,
    reference: nn.Module | None,
    preparation: Preparation,
    batches: Sequence[Args],
    labels: Sequence[Tensor | None],
) -> CalibrationReport:
    targets = preparation.targets
    comparison = _Comparison(batches, labels, reference is not None)
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
    norms = {t.path: t.original for t in targets if t.original is not None}
    count, given = (sum(map(images_in, b)) for b in (batches[:used], batches))
    notes = [] if count == given else [f"{count} of {given} images used: more do not fit in memory at a time"]
    found = comparison.summary()
    if preparation.method == "balance" and preparation.balanced and (found.get("drift_after") or 0) > FAR:
        notes.append('the outputs are still far from the original\'s; method="refit" (--method refit) comes closer')
    if original.inputs:
        found["distance"] = measured(norms, original.inputs, count).distance
    return CalibrationReport(count, matching.results(), passes=matching.passes, notes=tuple(notes), **found)


def _stand_ins(
    data: Any, model: nn.Module, reference: nn.Module | None, example_inputs: Any, images: int | None, seed: int
) -> StandIns | None:
    if not isinstance(data, str) or data not in KINDS:
        return None
    if reference is None:
        raise OptionError(f'data="{data}" needs the original network', hint="Pass it with reference=.")
    record = record_of(model)
    remembered = None if record is None else record.inputs
    return stand_ins(data, reference, example_inputs, images=images, remembered=remembered, seed=seed)


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


def _collected(data: Any, images: int | None, batch_size: int) -> tuple[list[Args], list[Tensor | None]]:
    """The batches to use, the last one cut to what was asked for, in memory: both networks see the same ones."""
    if images is not None:
        whole("images", images)
    if data is None:
        raise OptionError("calibrate needs images", hint="data=images, a tensor (N, C, H, W) or batches of them")
    most = images or (len(data) if isinstance(data, Tensor) else 256)
    batches, labels, left = [], [], most
    for args, y in as_batches(data, batch_size, once=True):
        part, part_y = _first(args, y, left)
        batches.append(part)
        labels.append(part_y)
        left -= images_in(part)
        if left <= 0:
            break
    return batches, labels


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
    record = record_of(model)
    if reference is not None or record is None:
        return reference
    try:
        rebuilt = copied(model)
        return revert(rebuilt)
    except RevertError as error:
        needed = any(s.target not in ("frozen", "fused") and s.transfer != "exact" for s in record.plan.steps)
        if needed:
            raise RevertError(error.message, hint="Pass the original network with reference=.") from error
        return None


def _check_enough(targets: Sequence[Target], count: int, asked: int | None) -> None:
    if asked is not None and count < asked and any(t.statistics for t in targets):
        raise DataError(
            f"running statistics were to be estimated over {asked} images, the data has {count}",
            hint=f"Give more images, or ask for fewer: images={count}.",
        )


class _Comparison:
    """Outputs of the original and of the network before and after, on the first images, or on all with labels."""

    def __init__(self, batches: Sequence[Args], labels: Sequence[Tensor | None], with_original: bool) -> None:
        self.labelled = with_original and all(y is not None for y in labels)
        self.enabled = with_original
        self.labels = labels if self.labelled else [None]
        self.batches = batches if self.labelled else [_first(batches[0], None, COMPARED)[0]]
        self.size = images_in(batches[0])
        self.outputs: dict[str, list[Any]] = {k: [None] * len(self.batches) for k in ("original", "before", "after")}

    def keep(self, which: str, i: int, out: Any) -> None:
        """An output on the whole of batch i."""
        if self.labelled:
            self.outputs[which][i] = out
        elif i == 0:
            self.outputs[which][0] = _rows(out, self.size, images_in(self.batches[0]))

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
            tally = OutputTally()
            for one, other, y in zip(self.outputs["original"], self.outputs[which], self.labels, strict=True):
                tally.add(one, other, y)
            total = tally.total()
            values[f"drift_{which}"] = None if total is None else total.relative
            values[f"agreement_{which}"] = tally.agreement()
            if tally.labelled:
                values["accuracy_original"] = tally.correct[0] / tally.labelled
                values[f"accuracy_{which}"] = tally.correct[1] / tally.labelled
        return values


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
        entry = {"action": "calibrate", "images": report.images, "layers": len(report.layers)}
        entry |= {"stand_ins": report.stand_ins} if report.stand_ins else {}
        entry |= {"method": preparation.method, "balanced": len(preparation.balanced), "eps": preparation.eps}
        record.history.append({**entry, "drift": [report.drift_before, report.drift_after]})
