"""Repair a converted network from a few unlabelled images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..choices import STAND_INS, Method
from ..conversion.history import Calibrated
from ..conversion.record import arguments_of, check_order, record_of
from ..conversion.revert import revert
from ..data.batches import MAX_BAD
from ..data.one_batch import images_in
from ..errors import Fix, NetworkError, OptionError, RevertError, Text
from ..modules.frozen_class import FrozenStatistics
from ..modules.restore import moved
from ..modules.tree import copied, device_and_dtype
from ..modules.wrappers import check_module, unwrapped
from ..norms.registry import identify, norm_named
from ..planning.plan import Transfer
from .images import check_enough, collected, fewer_of_large
from .norm_targets import Target, targets_of
from .prepare import Preparation
from .report import CalibrationReport, Tell, teller, told
from .run import calibrated
from .stand_ins import StandIns, stand_ins


def calibrate(
    model: nn.Module,
    reference: nn.Module | None = None,
    data: Any = None,
    *,
    images: int | None = None,
    batch_size: int = 64,
    method: Method = "refit",
    eps: float | None = None,
    preprocess: Callable[[Any], Tensor] | None = None,
    max_bad: int = MAX_BAD,
    example_inputs: Any = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | bool | None = None,
) -> CalibrationReport:
    """Bring a converted network back to its original with a few unlabelled images. In place.

    gamma and beta of the converted norms are set so that every channel of their outputs has the original's mean and
    variance over all images and positions: `k = sqrt(v_ref / v_new)`, `weight' = k weight`,
    `bias' = k (bias - m_new) + m_ref`. The norms are visited in the order in which they run, each seeing repaired
    inputs. Norms with running statistics (bn, sync, renorm) get them estimated exactly over the data, every value
    weighing alike (Wu and Johnson 2021, "precise BN"); their gamma and beta are set only where the conversion could
    not carry them over. frozen and fused need nothing.

    method: "moments" does this and nothing else. "balance" first chooses which channels share a group, where their
    order inside a block is free (`revert` undoes it too), and re-scales those that enter a group norm by factors
    between 1/2 and 2 and by -1, in the layer before it, so that the group's mean and variance differ less from sample
    to sample; gamma is divided by the same factors, which a BN would not notice. It also raises the `eps` of norms that
    compute per-sample statistics to 4, where the conversion was given none: on standardised channels they then follow
    a fifth of a sample's own variance (see `eps` of `convert`).
    "refit" (default) balances, and then fits each layer in front of a norm anew, by ridge regression of the values that
    the original has there on the inputs of the converted network. It comes closer nearly wherever it was measured, much
    closer in deep networks and with small groups, at three to five times the cost and twice the memory; `revert` stays
    exact, for a copy of the weights. Layers other than plain convolutions (1d, 2d) and linear layers are left.
    eps: another value for it, with any method; 0 leaves it as it is.

    model: from `convert` or `load`. reference: the original network; by default it is rebuilt from what the
    conversion kept. data: images without labels, anything `normswap.data.as_batches` takes; labels add accuracies to
    the report, for one more forward pass. Or "photos": crops of photographs that come with the package; or "synthetic":
    inputs optimised from them until the original's norms see the mean and variance that they remember from training.
    These need no data; they are shaped like example_inputs, where the conversion was given none and none can be
    guessed, and drawn by seed. A folder of such a name is Path("photos"). The report says how near any inputs come to
    those of the training.
    images: use at most so many (default 256, or all of a tensor, but 64 of 96 pixels a side and more for "refit");
    batches may differ in size. batch_size: for a tensor or a dataset.

    preprocess: of a folder's images, by default `Preprocess()`; max_bad: so many that cannot be read are left out.
    progress: called with steps done and steps in all: of making inputs, where they are made; then batches that the
    original has seen and norms repaired. By default a line on a terminal or in a notebook shows them, with True
    elsewhere too, with False nowhere.

    Cost, but for "refit": one forward pass of the reference and one of the converted network over the images. What
    lies between two layers is held for all images, however small the batches. A run on one image tells how much that
    is: where a batch takes more than half of the free memory, its images run in smaller parts; where all images
    together do, fewer are used and the report says so. Norms that run several times per forward take further
    passes, until their moments stay as they are (ten at most).

    A channel that does not vary keeps its gamma; its mean is matched. A norm without gamma and beta gets them, fixed
    (`requires_grad=False`). Training flags, hooks, random state and the reference stay as they are; on an exception,
    Ctrl-C included, the model is as before.

    Raises OptionError for a reference that does not fit, or that was itself converted from a network such as the
    model, RevertError when none is given and it cannot be rebuilt, DataError for data that cannot be used, is empty,
    or is too short for running statistics.
    """
    check_module(model)
    model = unwrapped(model)
    reference = _reference(model, None if reference is None else unwrapped(reference))
    with _beside(model, reference):
        with teller(progress, "making inputs") as tell:
            made = _stand_ins(data, model, reference, example_inputs, images, seed, tell)
        batches, labels, source = collected(
            model, made.batches if made else data, images, batch_size, preprocess, max_bad,
            arguments_of(model, example_inputs=example_inputs),
        )  # fmt: skip
        targets = targets_of(model, reference)
        if images is None and made is None and method == "refit" and not any(target.statistics for target in targets):
            batches, labels = fewer_of_large(batches, labels)
        count = sum(map(images_in, batches))
        check_enough(targets, count + len(source.bad), images)
        if not targets:
            return CalibrationReport(count, (), passes=0, notes=("frozen and fused norms need no calibration",))
        given = batches, labels, source.classes
        with told(progress, len(batches) + len(targets)) as step:
            preparation, report = calibrated(model, reference, targets, given, (method, eps), step)
        report = replace(report, bad=source.bad, stand_ins=str(made) if made else "")
        _remember(model, report, preparation)
        return report


def _beside(model: nn.Module, reference: nn.Module | None) -> AbstractContextManager[None]:
    """The reference on the device of the model, whose norms it is compared with; afterwards where it was."""
    if reference is None or device_and_dtype(reference)[0] == (device := device_and_dtype(model)[0]):
        return nullcontext()
    return moved(reference, device)


def estimate_statistics(
    model: nn.Module,
    data: Any = None,
    *,
    images: int | None = None,
    batch_size: int = 64,
    preprocess: Callable[[Any], Tensor] | None = None,
    max_bad: int = MAX_BAD,
    progress: Callable[[int, int], None] | bool | None = None,
) -> CalibrationReport:
    """Estimate the running statistics of a network's batch norms from images without labels, in place.

    For a network whose statistics were never updated, or do not belong to its data, and for one whose weights have
    changed since. Exactly over all values, each layer on what the layers before it give with their new statistics
    (Wu and Johnson 2021, "precise BN"). gamma, beta and momentum stay as they are, and so do layers that `freeze`
    holds.

    data, images, batch_size, preprocess, max_bad, progress: as in `calibrate`. Raises OptionError for a network without
    running statistics, and for stand-ins, which are made by such; DataError for data that cannot be used; on an
    exception, Ctrl-C included, the model is as it was.
    """
    check_module(model)
    if isinstance(data, str) and data in STAND_INS:
        raise OptionError(
            Text(Fix("data", data), " is made by the running statistics, which are to be estimated"),
            hint=f'Give images of your own; a folder of that name is Path("{data}").',
        )
    model = unwrapped(model)
    found = [(path, m, spec) for path, m in model.named_modules() if (spec := identify(m)) is not None]
    moving = [(p, m, spec) for p, m, spec in found if spec.updates_statistics and not isinstance(m, FrozenStatistics)]
    targets = [Target(path, spec.name, m, None, True, False) for path, m, spec in moving if spec.read(m).has_statistics]
    if not targets:
        raise NetworkError(f"{type(model).__name__} has no running statistics to estimate")
    inputs = arguments_of(model)
    batches, labels, source = collected(model, data, images, batch_size, preprocess, max_bad, inputs)
    check_enough(targets, sum(map(images_in, batches)) + len(source.bad), images)
    given = batches, labels, source.classes
    with told(progress, len(targets), "estimating running statistics") as step:
        _, report = calibrated(model, None, targets, given, ("moments", None), step)
    return replace(report, bad=source.bad)


def _stand_ins(
    data: Any,
    model: nn.Module,
    reference: nn.Module | None,
    example_inputs: Any,
    images: int | None,
    seed: int,
    tell: Tell | None,
) -> StandIns | None:
    if not isinstance(data, str) or data not in STAND_INS:
        return None
    if reference is None:
        raise OptionError(
            Text(Fix("data", data), " needs the original network"), hint=Text("Pass it as ", Fix("reference"), ".")
        )
    record = record_of(model)
    remembered = None if record is None else record.inputs
    return stand_ins(data, reference, example_inputs, images=images, remembered=remembered, seed=seed, progress=tell)


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
        steps = record.plan.steps
        needed = any(
            s.transfer.waits or not (norm_named(s.target).fixed or s.transfer is Transfer.EXACT) for s in steps
        )
        if needed:
            raise RevertError(
                error.message, hint=Text("Pass the original network as ", Fix("reference"), ".")
            ) from error
        return None


def _remember(model: nn.Module, report: CalibrationReport, preparation: Preparation) -> None:
    record = record_of(model)
    if record is not None:
        preparation.note(record)
        drift = [report.drift_before, report.drift_after]
        how = (preparation.method, len(preparation.balanced), preparation.eps)
        record.history.append(Calibrated(report.images, len(report.layers), *how, drift, report.stand_ins))
