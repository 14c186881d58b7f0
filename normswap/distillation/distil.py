"""Distil a converted network from its original, on images without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..choices import Augment, Loss, Parameters, Precision
from ..comparison.before_after import before_after
from ..conversion.history import Distilled
from ..conversion.record import arguments_of, record_of
from ..data.batches import MAX_BAD, Batches, as_batches, opened
from ..errors import CheckpointError, Fix, Interrupted, OptionError, Text
from ..files.locking import locked
from ..modules.wrappers import check_module, unwrapped
from ..training.parameters import trained_parameters, training_only
from ..training.run_state import load_state, network_digest
from ..training.teacher import original_of, side_by_side
from .report import DistillationReport, Progress, told
from .run import DistillationRun
from .settings import Kept, Settings
from .stream import Compared, Stream, stream_of

LR, FULL = 0.02, 300
"""The largest step of a value, as a share of its parameter's root mean square, in a run of `FULL` steps or more."""
UNCHANGED = (
    "no state that was measured came nearer to the original, so the network is as it was: take more images, more "
    "steps, or a smaller learning rate"
)
FEATURES = 2.0
"""How much the outputs of the norms inside count, beside the networks' outputs."""


def distil(
    model: nn.Module,
    reference: nn.Module | None = None,
    data: Any = None,
    *,
    steps: int = 300,
    batch_size: int = 64,
    lr: float | None = None,
    temperature: float = 2.0,
    train: Parameters = "all",
    weight_decay: float = 0.01,
    seed: int = 0,
    precision: Precision = "fp32",
    max_grad_norm: float | None = 1.0,
    augment: Augment = "none",
    loss: Loss = "auto",
    features: float = FEATURES,
    eval_data: Any = None,
    preprocess: Callable[[Any], Tensor] | None = None,
    max_bad: int = MAX_BAD,
    progress: Callable[[Progress], None] | bool | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
    resume: str | Path | None = None,
) -> DistillationReport:
    """Train `model` to give the outputs of the network it was converted from, without labels. In place.

    The loss between the original's outputs and the model's on the same images: for class scores `(N, K)`
    `T^2 KL(softmax(original / T) || softmax(model / T))`; for every other floating tensor of a tensor, list, tuple,
    dict or dataclass `||a - b||^2 / ||a||^2`; for torchvision's detectors the latter over the feature maps and the
    dense heads' outputs, since boxes have no gradient (a two-stage detector's RoI heads are not trained). Outputs of
    which there are as many as each network finds (other boxes, key points) are left out; where nothing else is left,
    the norms inside are what the student learns from. AdamW, a linear warm-up over the first tenth of the steps, then
    a cosine; gamma, beta and biases do not decay.

    Both networks run in eval mode, the way they are used: no dropout, no auxiliary heads, running statistics that
    stay as they are; only recurrent layers of the model are in train mode, as cuDNN needs it for gradients. Start from
    a calibrated network: it is nearer.

    model: from `convert` or `load`, weights in float32. reference: the original network, never changed; by default it
    is rebuilt from what the conversion kept. data: images without labels (labels are not looked at), anything
    `normswap.data.as_batches` takes. A tensor, Dataset or folder is shuffled; an iterable of batches keeps its order,
    and is iterated again when it ends. batch_size: for data that is not in batches yet.
    lr: the largest learning rate, relative to the root mean square of each parameter, which a step moves by about this
    share at most; by default what suits the number of steps (see `suited_rate`). A share suits layers of any width, and
    whatever was folded into them. train: "all" parameters that require a gradient, or those of the "norm" layers.
    precision: "bf16" or "fp16" computes in autocast on CUDA; on a CPU it is float32 always.
    max_grad_norm: limit of the gradient's norm, None for no limit. augment: "auto" mirrors and shifts images
    `(N, C, H, W)` at random, the same for both networks, "flip" mirrors them; "none" by default, since it gained
    nothing measurable, and text and digits have no mirror image.
    loss: "match" takes the second formula for class scores as well. features: the weight, falling linearly to 0, of the
    second formula's mean over the outputs of all converted norms, on half of each batch; 0 compares outputs alone.
    eval_data: what the report's loss, drift, agreement and, with labels, accuracy are measured on; by default a part of
    data that is held back from training for it (see `stream_of`), or, of an iterable that gives its batches in an order
    of its own, some of them. At the start, at the end and ten times between the model is compared with its original on
    these images, and it keeps the state with the smallest loss among those that decide no fewer images as the original
    does than at the start; the start counts. preprocess: of a folder's images, by default `Preprocess()`; max_bad: so
    many that cannot be read are left out. progress: called after each step; by default a line on a terminal or in a
    notebook shows where the run stands, with True elsewhere too, with False nowhere.
    checkpoint: a file to which the state of the run is written every `checkpoint_every` steps, when it is interrupted
    and at its end; resume: such a file, to go on from: the weights are then those of a run without interruption, on a
    CPU bit for bit, if model, data and settings are those it began with.

    The same seed gives the same weights, on a CPU bit for bit. Random state, training flags, `requires_grad`,
    gradients, hooks and the reference stay as they are.

    Raises OptionError, DataError, RevertError (no reference given and none to be rebuilt) or CheckpointError before
    anything has changed; TrainingError when loss or gradients are not finite, and `Interrupted`, a KeyboardInterrupt
    with a report, on Ctrl-C. Whatever it raises, the model has the nearest state that was measured, and its history
    tells of it.

    Source: Hinton, Vinyals and Dean 2015; Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and
    consistent" (teacher and student see the same view).
    """
    check_module(model)
    if data is None:
        raise OptionError(
            "distil needs images", hint=Text(Fix("data"), " takes a tensor (N, C, H, W), or batches of them.")
        )
    model = unwrapped(model)
    settings = Settings(
        steps, batch_size, 1.0, temperature, train, weight_decay, seed, precision,
        max_grad_norm, augment, loss, network_digest(model), features,
    )  # fmt: skip
    settings = replace(settings, lr=suited_rate(steps) if lr is None else lr)
    kept = Kept(_path(checkpoint), checkpoint_every, _path(resume))
    parameters = trained_parameters(model, train)
    reference = original_of(model, None if reference is None else unwrapped(reference))
    data = list(data) if isinstance(data, Iterator) else data
    reading: dict[str, Any] = {"preprocess": preprocess, "max_bad": max_bad}
    network: dict[str, Any] = {"network": model, "inputs": arguments_of(model)}
    stream = stream_of(opened(data, batch_size, **reading), batch_size, seed, hold=eval_data is None, **network)
    given = None if eval_data is None else as_batches(eval_data, batch_size, **network, **reading)
    alone = nullcontext() if kept.file is None else locked(kept.file)
    work: DistillationRun | None = None
    try:
        with alone, side_by_side(reference, model), training_only(model, parameters), told(progress) as tell:
            work = DistillationRun(model, reference, settings, stream, parameters, _compared(stream, settings, given))
            return _finished(work, kept, tell)
    finally:  # outside of what puts back all that running a network leaves on it
        if work is not None:
            _remember(model, work)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _finished(work: DistillationRun, kept: Kept, tell: Callable[[Progress], None] | None) -> DistillationReport:
    """Do the steps that are left. Raises Interrupted, with a report, on Ctrl-C."""
    if kept.file is not None:
        work.checkpoint, work.every = kept.file, kept.every
    if kept.resume is not None:
        work.resume(load_state(kept.resume, vars(work.settings), work.parameters, _check_age))
    try:
        work.finish(tell)
    except KeyboardInterrupt:
        raise Interrupted(_report(work, interrupted=True)) from None
    return _report(work)


def suited_rate(steps: int) -> float:
    """The default learning rate of a run of so many steps: `LR`, and in a short run less, with its length squared.

    What the first steps disturb needs a few hundred more to come right again. A network far from its original may gain
    from more than that in a short run.
    """
    return LR * min(1.0, steps / FULL) ** 2


def _check_age(state: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a state without the nearest, of a run that held nothing back to measure it on."""
    if "best" not in state:
        raise CheckpointError(
            "this training state was written by an older normswap", hint="Begin anew, from the last network saved."
        )


def _compared(stream: Stream, settings: Settings, given: Batches | None) -> Compared:
    """What is held back or given; without either, four batches or, of a long run, a twentieth of its steps."""
    if given is None:
        return stream.compared(max(4, settings.steps // 20))
    return Compared(given, "of eval_data", None if given.classes is None else len(given.classes))


def _report(work: DistillationRun, *, interrupted: bool = False) -> DistillationReport:
    first, best = work.judge.first, work.judge.final()
    notes = (*work.notes, *first.tally.notes)
    if best.step == 0 and work.step and not interrupted:
        notes += (UNCHANGED,)
    begun, ended = work.losses
    return DistillationReport(
        work.step, work.settings.steps, work.stream.images, begun, ended,
        interrupted=interrupted, resumed_at=work.resumed_at, notes=notes, kept=best.step,
        compared=work.judge.images, compared_on=work.judge.compared.origin, bad=tuple(work.stream.bad),
        eval_loss_before=first.loss, eval_loss_after=best.loss, losses=work.curve,
        eval_losses=tuple(sorted(set(work.judge.looks))), **before_after(first.tally, best.tally),
    )  # fmt: skip


def _remember(model: nn.Module, work: DistillationRun) -> None:
    """Note in the network's history what was done, also when it was cut short; nothing where nothing came of it."""
    record, kept = record_of(model), work.judge.best.step
    if record is None or kept == 0:
        return
    settings = work.settings
    done = (work.step, settings.steps, kept)
    record.history.append(Distilled(*done, settings.train, settings.lr, settings.seed, list(work.losses)))
