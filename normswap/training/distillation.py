"""Distil a converted network from its original, on images without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..agreement import OutputTally
from ..choices import Augment, Loss, Parameters, Precision
from ..conversion import record_of
from ..data import MAX_BAD, Batch, as_batches, images_in, opened
from ..errors import Interrupted, OptionError
from ..surgery import check_module
from ..values import whole
from ..writing import check_writable
from .optimizer import trained_parameters, training_only
from .outputs import run
from .report import DistillationReport as DistillationReport
from .report import Progress as Progress
from .report import told
from .run import Run
from .settings import Settings
from .state import digest, load_state
from .stream import Stream, seed_step, stream_of
from .teacher import original_of, side_by_side

LR = 0.02
"""The largest step of a value, as a share of the root mean square of its parameter."""
FEATURES = 2.0
"""How much the outputs of the norms inside count, beside the networks' outputs."""
COMPARED = 256
"""Without eval_data, on how many images drift and agreement are measured at most."""


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
    dense heads' outputs, since boxes have no gradient (a two-stage detector's RoI heads are not trained). AdamW, a
    linear warm-up over the first tenth of the steps, then a cosine; gamma, beta and biases do not decay.

    Both networks run in eval mode, the way they are used: no dropout, no auxiliary heads, running statistics that
    stay as they are; only recurrent layers of the model are in train mode, as cuDNN needs it for gradients. Start from
    a calibrated network: it is nearer.

    model: from `convert` or `load`, weights in float32. reference: the original network, never changed; by default it
    is rebuilt from what the conversion kept. data: images without labels (labels are not looked at), anything
    `normswap.data.as_batches` takes. A tensor, Dataset or folder is shuffled; an iterable of batches keeps its order,
    and is iterated again when it ends. batch_size: for data that is not in batches yet.
    lr: the largest learning rate, relative to the root mean square of each parameter, which a step moves by about this
    share at most; default 0.02. A share suits layers of any width, and whatever was folded into them. train: "all"
    parameters that require a gradient, or those of the "norm" layers.
    precision: "bf16" or "fp16" computes in autocast on CUDA; on a CPU it is float32 always.
    max_grad_norm: limit of the gradient's norm, None for no limit. augment: "auto" mirrors and shifts images
    `(N, C, H, W)` at random, the same for both networks, "flip" mirrors them; "none" by default, since it gained
    nothing measurable, and text and digits have no mirror image.
    loss: "match" takes the second formula for class scores as well. features: the weight, falling linearly to 0, of the
    second formula's mean over the outputs of all converted norms, on half of each batch; 0 compares outputs alone.
    eval_data: what the report's drift, agreement and, with labels, accuracy are measured on; by default the first
    256 images of data. preprocess: of a folder's images, by default `Preprocess()`; max_bad: so
    many that cannot be read are left out. progress: called after each step; by default a line on a
    terminal or in a notebook shows where the run stands, with True elsewhere too, with False nowhere.
    checkpoint: a file to which the state of the run is written every `checkpoint_every` steps, when it is interrupted
    and at its end; resume: such a file, to go on from: the weights are then those of a run without interruption, on a
    CPU bit for bit, if model, data and settings are those it began with.

    The same seed gives the same weights, on a CPU bit for bit. Random state, training flags, `requires_grad`,
    gradients, hooks and the reference stay as they are.

    Raises OptionError, DataError, RevertError (no reference given and none to be rebuilt) or CheckpointError before
    anything has changed; TrainingError when loss or gradients are not finite, and `Interrupted`, a KeyboardInterrupt
    with a report, on Ctrl-C. Whatever it raises, the model keeps the last good state that it has reached, and its
    history tells of it.

    Source: Hinton, Vinyals and Dean 2015; Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and
    consistent" (teacher and student see the same view).
    """
    check_module(model)
    if data is None:
        raise OptionError("distil needs images", hint="data=images, a tensor (N, C, H, W) or batches of them")
    settings = Settings(
        steps, batch_size, LR if lr is None else lr, temperature, train, weight_decay, seed, precision,
        max_grad_norm, augment, loss, digest(model), features,
    )  # fmt: skip
    whole("checkpoint_every", checkpoint_every)
    if checkpoint is not None:
        check_writable(Path(checkpoint), overwrite=True)
    parameters = trained_parameters(model, train)
    reference = original_of(model, reference)
    data = list(data) if isinstance(data, Iterator) else data
    reading: dict[str, Any] = {"preprocess": preprocess, "max_bad": max_bad}
    stream = stream_of(opened(data, batch_size, **reading), batch_size, seed)
    with side_by_side(reference, model), training_only(model, parameters):
        compared = (
            _compared(stream, settings)
            if eval_data is None
            else as_batches(eval_data, batch_size, preprocess=preprocess, max_bad=max_bad)
        )
        before = _tally(reference, model, compared)
        work = Run(model, reference, settings, stream, parameters)
        if checkpoint is not None:
            work.checkpoint, work.every = Path(checkpoint), checkpoint_every
        if resume is not None:
            work.resume(load_state(Path(resume), vars(settings), parameters))
        try:
            with told(progress) as tell:
                work.finish(tell)
            after = _tally(reference, model, compared)
        except KeyboardInterrupt:
            raise Interrupted(_report(work, before, None)) from None
        finally:
            _remember(model, work)
        return _report(work, before, after)


def _compared(stream: Stream, settings: Settings) -> list[Batch]:
    """Some batches of the data, held in memory: as many images as are compared, at a small part of the run's cost."""
    found: list[Batch] = []
    count = 0
    seed_step(settings.seed, -1)
    for args in islice(stream.epoch(0, 0), max(1, settings.steps // 20)):
        found.append((args, None))
        count += images_in(args)
        if count >= COMPARED:
            break
    return found


@torch.no_grad()
def _tally(reference: nn.Module, model: nn.Module, batches: Iterable[Batch]) -> tuple[OutputTally, int]:
    """Compare the networks' own outputs, boxes included; and on how many images."""
    classes = getattr(batches, "classes", None)
    tally, count = OutputTally(None if classes is None else len(classes)), 0
    for args, labels in batches:
        tally.add(run(reference, reference, args), run(model, model, args), labels)
        count += images_in(args)
    return tally, count


def _report(work: Run, before: tuple[OutputTally, int], after: tuple[OutputTally, int] | None) -> DistillationReport:
    values: dict[str, Any] = {"compared": before[1]}
    for which, tally in (("before", before[0]), ("after", None if after is None else after[0])):
        if tally is None:
            continue
        total = tally.total()
        values[f"drift_{which}"] = None if total is None else total.relative
        values[f"agreement_{which}"] = tally.agreement()
        if tally.labelled:
            values["accuracy_original"] = tally.correct[0] / tally.labelled
            values[f"accuracy_{which}"] = tally.correct[1] / tally.labelled
    notes = (*work.notes, *before[0].notes)
    drift, now = (values.get(f"drift_{which}") for which in ("before", "after"))
    if drift is not None and now is not None and now > drift:
        notes += ("the network is further from its original than it was: take more steps, or a smaller learning rate",)
    first, last = work.losses
    return DistillationReport(
        work.loop.step, work.settings.steps, work.stream.images, first, last,
        bad=tuple(work.stream.bad), interrupted=after is None, resumed_at=work.resumed_at, notes=notes, **values,
    )  # fmt: skip


def _remember(model: nn.Module, work: Run) -> None:
    """Note in the network's history what was done, also when it was cut short."""
    record = record_of(model)
    if record is None or work.loop.step == 0:
        return
    settings = work.settings
    entry = {"action": "distil", "steps": work.loop.step, "planned": settings.steps, "train": settings.train}
    record.history.append({**entry, "lr": settings.lr, "seed": settings.seed, "loss": list(work.losses)})
