"""`normswap.finetune`: what was asked for -> a network, a task, data, settings -> a run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import one_of
from ..choices import TASKS, Augment, Device, Optimizer, Precision, Tracker
from ..choices import Task as TaskName
from ..conversion.composite import adopt_part_records
from ..conversion.convert import convert
from ..conversion.stabilize import stabilized
from ..errors import Fix, Interrupted, OptionError, Text, plural
from ..heads.classifier import Head
from ..modules.frozen_class import FrozenStatistics
from ..modules.restore import restored_on_error
from ..modules.wrappers import check_module
from ..norms.registry import identify
from ..training.distributed import all_or_none, check_same
from ..training.parameters import training_only
from ..training.run_state import network_digest
from ..training.teacher import original_of
from .asked import Asked, monitored, name_of, settled
from .datasets.batched import told_of
from .datasets.mixing import Mixing
from .datasets.splits import Sets
from .engine.accelerator import processes
from .engine.freezing import frozen, modes_kept
from .engine.optimizer import trained
from .engine.trainer import Job, Trainer
from .output.layout import check_outside, run_folder
from .output.report import FinetuneReport, Progress, told
from .settings import RunOptions, Settings
from .tasks.base import Task
from .tasks.classification import Classification
from .tasks.detection import Detection
from .tasks.head import new_head
from .tasks.segmentation import Segmentation


@torch.enable_grad()
def finetune(
    model: nn.Module,
    data: Any,
    eval_data: Any = None,
    *,
    task: TaskName = "classification",
    output: str | Path | None = None,
    batch_size: int = 2,
    epochs: int | None = None,
    steps: int | None = None,
    accumulate: int = 1,
    lr: float | None = None,
    optimizer: Optimizer = "adamw",
    weight_decay: float = 0.01,
    warmup: float = 0.05,
    clip_grad: float | None = 1.0,
    train: str = "all",
    freeze_stats: bool = False,
    freeze_affine: bool = False,
    distil: float = 0.0,
    reference: nn.Module | None = None,
    ema: float = 0.0,
    label_smoothing: float = 0.0,
    mixup: float | None = None,
    cutmix: float | None = None,
    rand_augment: int | None = None,
    num_classes: int | None = None,
    augment: Augment = "auto",
    preprocess: Callable[[Any], torch.Tensor] | None = None,
    stabilize: bool = True,
    precision: Precision = "fp32",
    device: Device | str = "auto",
    channels_last: bool | None = None,
    compile: bool = False,
    workers: int | None = None,
    seed: int = 0,
    max_bad: int = 10,
    patience: int | None = None,
    monitor: str | None = None,
    checkpoint_every: int | str | None = None,
    tensorboard: bool = False,
    track: Tracker | Sequence[Tracker] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | bool | None = None,
) -> FinetuneReport:
    """Train a network on labelled images, boxes or masks, at batches of any size. In place.

    data: a folder with `train` and `val` folders, or without, when a tenth of its images is held back for validation;
    or a map-style Dataset. eval_data: likewise. task says what is in them:
    "classification": one subfolder of images for each class; samples are (input, label), or, for a network that takes
    several arguments, (x, lengths, label), ((x, lengths), label) or a dict. Also a pair of tensors, inputs `(N, *)` and
    int64 labels `(N,)`; batches of one size; or a DataLoader, of which the data set and the `collate_fn` are used: the
    batches are of `batch_size`, in an order of finetune's own.
    "detection", for networks in torchvision's convention, `model(images, targets)` -> a dict of losses: what
    `normswap.data.open_coco`, `open_yolo` or `open_voc` reads; in a folder, `annotations.json` with the images beside
    it or in `images/`, COCO's own layout, YOLO's (or its data.yaml), or Pascal VOC's. Samples are (image, target); see
    `BoxData`.
    "segmentation", for networks that give scores `(N, K, H, W)`, or a dict with them as `out`: what
    `normswap.data.open_masks` reads. Samples are (image, mask); see `MaskData`.
    output: a folder for metrics.jsonl, curves.png, last.safetensors, best.safetensors and the state of the run, which
    is written at the start, after every epoch and when the run is stopped. None writes nothing. resume: go on from
    the state in `output`, on a CPU bit for bit as if there had been no interruption. overwrite: replace an older run.

    batch_size: samples of one forward pass in each process; a step sums up `accumulate` of them in all processes.
    epochs (default 10) or steps: the length. lr: the largest learning rate, by default scaled by the global batch
    (see `default_rate`); it rises over the first `warmup` share of the steps and follows a cosine to zero.
    optimizer: "adamw" or "sgd" (Nesterov momentum 0.9). weight_decay: of weights; gamma, beta and biases do not decay.
    clip_grad: limit of the gradient's norm, None for none.
    stabilize: train folded layers at the size that their weights had before the fold, with centralized gradients; then
    a converted network takes the learning rates of its original (see `stabilized`; False is for comparison).
    train: "all", "norm" (gamma and beta), "head", or a pattern of parameter names; norms outside of it keep their
    running statistics. freeze_stats, freeze_affine: freeze running statistics, or gamma and beta, of all norms.
    distil: share of the loss that follows the scores of the original network, `reference`, by default rebuilt.
    ema: decay of an average of the weights, such as 0.999; the average is then what is validated, saved and returned.
    label_smoothing: share of the label that goes to all classes alike, of classification and segmentation.
    mixup, cutmix: mix the pictures of every training batch of a classifier, and their labels; alpha of the share's Beta
    distribution, such as 0.2 and 1; with both, each batch gets one of them. rand_augment: so many changes of
    RandAugment, such as 2, for each of a classifier's training pictures in files.
    num_classes: a new head for another number of classes (detection: with the background, as in torchvision); by
    default where the data has another number.
    augment: "auto" (random crop, mirroring; detection: mirroring), "flip" or "none", for pictures in files; your own
    Dataset stays as it is. preprocess: PIL image -> tensor `(C, H, W)`, by default `Preprocess()`; detectors do that.
    precision: "fp32", "bf16" or "fp16". device: "auto", "cpu", "cuda", "cuda:1", "mps".
    patience: end the run after so many validations in a row without a better figure. monitor: the validation figure
    that decides this, and which network is the best: "accuracy" or "loss"; "map", "map_50", ...; "miou",
    "pixel_accuracy" or "loss"; the first is usual. checkpoint_every: 500 (steps) or "10 minutes": write the state that
    often too.
    track: "wandb", "mlflow" or several; they get the figures of metrics.jsonl, as "tensorboard" does in the folder.
    max_bad: so many unreadable images are skipped. progress: told of the run several times a second; by
    default a line on a terminal or in a notebook shows it, with True elsewhere too, with False nowhere.

    Under torchrun or accelerate launch each process takes its share of every step, and the figures count each sample
    once. The same seed gives the same network, on a CPU bit for bit. Needs the extra `normswap[train]`.

    Raises OptionError, DataError, OutputError, CheckpointError before anything has changed; TrainingError for a loss
    that is not finite or too little memory: the network is then that of the last checkpoint. Ctrl-C, SIGTERM and
    SIGHUP end the step and save the state; then Ctrl-C raises `Interrupted`, a KeyboardInterrupt with a report, and the
    others do what they did before.
    """
    folder = None if output is None else Path(output)
    if resume and folder is None:
        raise OptionError("resume needs the output folder of the run to go on with")
    check_module(model)
    _check_model(model, freeze_stats)
    tracked = {track} if isinstance(track, str) else set(track)
    place = RunOptions(
        folder, device, workers, channels_last, compile, max_bad, tensorboard or "tensorboard" in tracked, resume,
        overwrite, checkpoint_every, tuple(sorted(tracked - {"tensorboard"})),
    )  # fmt: skip
    settings = Settings(
        steps=1, batch_size=batch_size, accumulate=accumulate, processes=1, samples=1, optimizer=optimizer,
        lr=1.0 if lr is None else lr, weight_decay=weight_decay, warmup=warmup, clip_grad=clip_grad, train=train,
        distil=distil, ema=ema, label_smoothing=label_smoothing, precision=precision, stabilize=stabilize, seed=seed,
        network="", task=task, augment=augment, prepare=name_of(preprocess),
        frozen=" ".join(name for name, on in (("statistics", freeze_stats), ("affine", freeze_affine)) if on),
        patience=patience, monitor=monitored(task, monitor), mixup=mixup or None, cutmix=cutmix or None,
        rand_augment=rand_augment,
    )  # fmt: skip
    doing = task_of(
        task, label_smoothing=label_smoothing, distil=distil, mixup=mixup, cutmix=cutmix, rand_augment=rand_augment
    )  # fmt: skip
    sets = data if isinstance(data, Sets) else doing.open(model, data, eval_data, seed=seed)
    note = told_of(data, batch_size)
    if folder is not None:
        check_outside(folder, (getattr(part, "folder", None) for part in (sets.train, sets.validation)))
    job = Job(doing, replace(settings, data=sets.digest), place, doing.prepared(sets, preprocess, augment))
    asked = Asked(epochs, steps, lr, num_classes, reference, freeze_stats, freeze_affine)
    with ExitStack() as stack:
        accelerator = stack.enter_context(processes(device, precision))
        with all_or_none():
            if folder is not None and accelerator.is_main_process:  # before anything takes time
                stack.enter_context(run_folder(folder, resume=resume, force=overwrite))
        report, stopped_by = _run(model, job, asked, accelerator, progress)
    report = replace(report, notes=(*filter(None, [note]), *report.notes))
    if stopped_by == signal.SIGINT:
        raise Interrupted(report)
    if stopped_by is not None:
        signal.raise_signal(stopped_by)
    return report


def _run(
    model: nn.Module, job: Job, asked: Asked, accelerator: Any, progress: Callable[[Progress], None] | bool | None
) -> tuple[FinetuneReport, int | None]:
    """Make the network ready and train it. Also the signal that ended the run, if one did."""
    with restored_on_error(model) as keep:
        with all_or_none():
            job = settled(job, asked, accelerator)
            if job.place.output is not None and adopt_part_records(model) is None:
                model = convert(model, rules={"*": "keep"}, inplace=True, check=False)  # so that it can be saved
            model.to(accelerator.device)
            fitted_before = new_head(model)
            head = _fitted(model, job, asked, accelerator.device)
            heads = job.task.head_parameters(model, head)
            parameters = trained(model, job.settings.train, heads, affine=not asked.freeze_affine)
            job = replace(job, settings=replace(job.settings, network=network_digest(model)))
        check_same({**asdict(job.settings), "resume": job.place.resume})
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        scope = frozen(model, parameters, stats=asked.freeze_stats, affine=asked.freeze_affine)
        trainer: Trainer | None = None
        sized = stabilized(model) if job.settings.stabilize else nullcontext()
        try:
            with scope as notes, modes_kept(model), training_only(model, parameters), sized, told(progress) as tell:
                trainer = Trainer(model, job, parameters, flags, accelerator, tell)
                report = trainer.run(resume=job.place.resume)
        finally:
            if trainer is not None and trainer.checkpointer.saved is not None:
                keep()
    fitted = None if head is None or new_head(model) == fitted_before else head
    notes = _notes(notes, report, job.settings, fitted, None if asked.freeze_stats else model)
    return replace(report, notes=tuple(notes)), trainer.stopped_by


def _fitted(model: nn.Module, job: Job, asked: Asked, device: torch.device) -> Head | None:
    """Give the task its teacher, if there is to be one, and the network a head for the classes of the data."""
    if job.settings.distil and isinstance(job.task, Classification):
        job.task.teacher = original_of(model, asked.reference).to(device)
        job.task.teacher.eval()  # its own `train` need not return it
    return job.task.fit(model, job.sets, asked.classes, job.settings.seed)


def _notes(
    scope: list[str], report: FinetuneReport, settings: Settings, fitted: Head | None, model: nn.Module | None
) -> list[str]:
    """What to say of a run. scope: what is known already. fitted: a head that is new. model: None if it was frozen."""
    notes = [*scope, *report.notes]
    if fitted is not None:
        where = f", {fitted.path}" if fitted.path else ""
        notes.insert(0, f"the network got a new head for {fitted.classes} classes{where}")
    early = report.steps < settings.steps and not report.interrupted
    if early:
        figure = report.best_name.removeprefix("val_").replace("_", " ")
        waited = f"{plural(settings.patience or 0, 'validation')} without a better {figure}"
        notes.append(f"ended after {report.steps} of {settings.steps} steps: {waited}")
    if report.best_at == 0 and not report.interrupted:
        notes.append("validation found no network better than the one that training began with; best is that one")
    if model is not None and (small := small_batch_note(model, settings.batch_size, settings.processes)):
        notes.append(small)
    return notes


def task_of(
    name: str,
    *,
    label_smoothing: float = 0.0,
    distil: float = 0.0,
    mixup: float | None = None,
    cutmix: float | None = None,
    rand_augment: int | None = None,
) -> Task:
    """A task by its name. Raises OptionError for an unknown one, or an option that does not go with it."""
    one_of("task", name, TASKS)
    of_classes = {"mixup": mixup, "cutmix": cutmix, "rand_augment": rand_augment}
    asked = next((option for option, value in of_classes.items() if value), None)
    if name != "classification" and asked is not None:
        raise OptionError(
            Text(
                Fix(asked),
                f" goes with classification, not with {name}: it would part pictures from what is true of them",
            ),
            hint=Text(Fix("augment"), " changes both together."),
        )
    if name != "classification" and distil:
        raise OptionError(
            Text(Fix("distil"), f" goes with classification, not with {name}"),
            hint="normswap distil trains a detector or segmentation network after its original, without labels.",
        )
    if name == "classification":
        mixing = Mixing(mixup or None, cutmix or None)
        return Classification(label_smoothing, distil=distil, mixing=mixing, random=rand_augment)
    if name == "segmentation":
        return Segmentation(label_smoothing)
    if label_smoothing:
        raise OptionError(Text(Fix("label_smoothing"), " does not go with detection, whose losses are the network's"))
    return Detection()


def small_batch_note(model: nn.Module, batch_size: int, processes: int = 1) -> str | None:
    """What to say to someone who trains BatchNorm layers on batches of 1 to 4 samples."""
    moving = [module for module in nn.Module.modules(model) if not isinstance(module, FrozenStatistics)]
    suffers = [spec.small_batch for module in moving if (spec := identify(module)) is not None]
    count = suffers.count("process") + (suffers.count("all") if processes == 1 else 0)
    if not count or batch_size > 4:
        return None
    shared = "; over several processes, sync shares the statistics" if processes > 1 else ""
    return Text(
        f"{count} BatchNorm layer{'s' * (count != 1)} will see batches of {batch_size}, whose statistics are poor. "
        "Better: convert to gn or renorm, or ", Fix("freeze_stats", True), shared,
    )  # fmt: skip


def _check_model(model: nn.Module, freeze_stats: bool) -> None:
    """What is wrong about the network whatever the data is."""
    if freeze_stats and not any(m._buffers.get("running_mean") is not None for m in nn.Module.modules(model)):
        raise OptionError(
            Text("no norm of the network has running statistics, so there is nothing for ", Fix("freeze_stats")),
            hint=Text(Fix("freeze_affine", True), " freezes gamma and beta."),
        )
