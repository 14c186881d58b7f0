"""`normswap finetune`: train a converted network on labelled images; convert and calibrate it first, if asked to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ...choices import AUGMENTS, OPTIMIZERS, PARAMETERS, PRECISIONS, TASKS
from ...errors import Interrupted
from ...machine.limits import check_workers
from ..arguments import options, training
from ..arguments.config import Config, PrintConfig
from ..arguments.datasets import DataPlace
from ..arguments.networks import ResolvedSource, files_read, locate
from ..arguments.preprocessing import remember
from ..terminal import flags
from ..terminal.errors import WRITTEN
from ..terminal.output import Output, reporting
from . import _finetune_report
from ._finetune_job import LEARNING, FinetuneJob
from ._finetune_network import converted, network_of, stem_of, transform_of

if TYPE_CHECKING:
    from torch import nn

    from ...finetuning.datasets.splits import Sets
    from ...finetuning.output.report import FinetuneReport


def finetune(
    ctx: typer.Context,
    source: options.Source,
    data: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|torchvision:NAME",
            help="What --task trains on, or train and val folders of such; or a data set of torchvision.",
            show_default=False,
        ),
    ],
    task: Annotated[
        str,
        options.word(
            TASKS, "One subfolder for each class; boxes of COCO, YOLO or Pascal VOC; or a mask beside each image."
        ),
    ] = "classification",
    eval_data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="What to validate on.", show_default="val/ in --data, or a tenth of it"),
    ] = None,
    annotations: options.Annotations = None,
    eval_annotations: options.EvalAnnotations = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images in a batch of each process.")] = 2,
    epochs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Passes over the images.", show_default="10")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Steps, in place of --epochs.", show_default=False)
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="NORM",
            help="Convert to this norm first; calibrate on the training images, if it was trained on such.",
            autocompletion=options.norm_names,
            show_default=False,
        ),
    ] = None,
    groups: options.Groups = None,
    channels_per_group: options.ChannelsPerGroup = None,
    indivisible: options.Indivisible = "error",
    rule: options.Rule = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar=f"FOLDER|{options.STAND_IN}|none",
            help="After --to or --rule, calibrate on the unlabelled images of a folder, on photographs or made inputs "
            "in their place, or not at all.",
            show_default="the images of --data",
        ),
    ] = None,
    calibrate_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Calibrate on at most so many images.",
            show_default="256, 32 with boxes or masks, 64 to 256 stand-ins",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(min=0, metavar="RATE", help="Largest learning rate.", show_default="scaled by the global batch"),
    ] = None,
    optimizer: Annotated[str, options.word(OPTIMIZERS, "The optimizer.")] = "adamw",
    weight_decay: Annotated[
        float, typer.Option(min=0, metavar="VALUE", help="Decay of weights; γ, β and biases do not decay.")
    ] = 0.01,
    warmup: Annotated[
        float, typer.Option(min=0, max=1, metavar="SHARE", help="Share of the steps in which the rate rises.")
    ] = 0.05,
    clip_grad: Annotated[
        float, typer.Option(min=0, metavar="NORM", help="Largest norm of the gradient; 0 for no limit.")
    ] = 1.0,
    no_stabilize: Annotated[
        bool, typer.Option("--no-stabilize", help="Train folded layers as they are; for comparison.")
    ] = False,
    accumulate: Annotated[int, typer.Option(min=1, metavar="N", help="Batches summed up for one step.")] = 1,
    train: Annotated[
        str,
        options.word((*PARAMETERS, "head"), "What trains; a pattern is of parameter names.", also="PATTERN", fits=".*"),
    ] = "all",
    freeze_stats: Annotated[bool, typer.Option("--freeze-stats", help="Freeze running statistics.")] = False,
    freeze_affine: Annotated[bool, typer.Option("--freeze-affine", help="Freeze γ and β.")] = False,
    distil: Annotated[
        float, typer.Option(min=0, max=1, metavar="WEIGHT", help="Share of the loss that follows the original network.")
    ] = 0.0,
    ema: Annotated[bool, typer.Option("--ema", help="Average the weights, and keep the average.")] = False,
    ema_decay: Annotated[
        float | None, typer.Option(metavar="DECAY", help="Decay of that average.", show_default="0.999")
    ] = None,
    label_smoothing: Annotated[float, typer.Option(min=0, metavar="SHARE", help="Label smoothing.")] = 0.0,
    mixup: training.Mixup = None,
    cutmix: training.Cutmix = None,
    rand_augment: training.RandAugment = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="A new head for so many classes; detection counts the background.",
            show_default="as the data has",
        ),
    ] = None,
    augment: Annotated[str, options.word(AUGMENTS, "Random changes: crop and mirror, mirror only, or none.")] = "auto",
    size: options.Size = None,
    mean: options.Mean = None,
    std: options.Std = None,
    data_root: options.DataRoot = Path("data"),
    download: options.Download = False,
    device: options.Device = "auto",
    patience: training.Patience = None,
    monitor: training.Monitor = None,
    precision: Annotated[str, options.word(PRECISIONS, "What is computed in.")] = "fp32",
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last/--channels-first", help="Memory layout.", show_default="by device")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network with torch.compile.")] = False,
    workers: options.Workers = None,
    max_bad: options.MaxBad = 10,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where the run is kept.", show_default="runs/<SOURCE>"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    checkpoint_every: training.CheckpointEvery = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run in --output.")] = False,
    report: options.Report = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's files too.")] = False,
    track: training.Track = None,
    weights: options.Weights = None,
    arg: options.Arg = None,
    built_by: options.BuiltBy = None,
    trust_pickle: options.TrustPickle = False,
    trust_code: options.TrustCode = False,
    allow_nonfinite: options.AllowNonfinite = False,
    seed: options.Seed = 0,
    config: Config = None,
    print_config: PrintConfig = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a network on labelled images, boxes or masks, at small batches. With --to, convert and calibrate it first.

    --task detection reads FOLDER/annotations.json with FOLDER/images, train and val folders of such, COCO's own
    layout, YOLO's data.yaml, Pascal VOC's Annotations/, or --annotations FILE. --task segmentation reads images/ and
    masks/, or NAME_mask.png beside each image.
    Writes to the folder runs/<SOURCE>, or --output: best.safetensors and last.safetensors, metrics.jsonl and
    curves.png, and after every epoch the state from which --resume goes on. Ctrl-C saves it too. For many GPUs:
    torchrun --nproc-per-node=N -m normswap finetune ...

    \b
    normswap finetune resnet50 --to gn --data photos/ --batch-size 2
    normswap finetune resnet50-gn-calibrated.safetensors --data torchvision:CIFAR10 --download --epochs 5
    normswap finetune fasterrcnn_resnet50_fpn_v2 --task detection --data coco/ --rule 'role:head=gn' --batch-size 1
    """
    job = FinetuneJob.of(ctx, DataPlace(task, data, eval_data, annotations, eval_annotations, data_root, download))
    helper = os.environ.get("RANK", "0") != "0"  # one of torchrun's processes, whose first one does the talking
    with reporting(ctx, silent=helper) as out:
        if workers is not None:
            check_workers(workers)
        out.step("loading PyTorch")
        from ...finetuning.engine.accelerator import met
        from ...finetuning.output.layout import STATE
        from ...finetuning.output.trackers import check_installed
        from ...training.distributed import all_or_none

        check_installed([*job.training["track"], *(["tensorboard"] if job.training["tensorboard"] else [])])
        job.check()
        with met(device):
            with all_or_none():
                origin = locate(ctx, job.wanted)
                folder = output or Path("runs", stem_of(origin, job.swap))
                if not helper:
                    _reserve(ctx, job, origin, folder, force=force)
                command = job.swap.described(origin, job.asked)
                if resume:
                    _finetune_report.keep_command(folder, command, resume=True)
                ready = _ready(ctx, job, origin, folder, out)
            ctx.meta[WRITTEN] = None
            asked = None if resume else {**command, "options": _settled_options(ctx)}
            found = _trained(ctx, job, ready, folder, asked, out)
        if found.classes and not helper:
            _finetune_report.keep_result(folder, found)
        out.show(
            lambda: {"network": ready.origin.to_dict(), "output": str(folder), **found.to_dict()},
            lambda page: _finetune_report.show(page, found, folder, ready.origin),
        )
        if found.interrupted:
            ctx.meta[WRITTEN] = folder / STATE
            raise KeyboardInterrupt


class Ready(NamedTuple):
    """What training takes. preprocess: None for detectors, which prepare their images themselves."""

    model: nn.Module
    origin: ResolvedSource
    sets: Sets
    preprocess: Any


def _reserve(ctx: typer.Context, job: FinetuneJob, origin: ResolvedSource, folder: Path, *, force: bool) -> None:
    """The folder of the run is ours until the command ends, and nothing that is read lies in it."""
    from ...finetuning.output.layout import check_outside, run_folder

    place = job.data
    check_outside(folder, (Path(place.data), place.evaluation, job.swap.folder))
    kept = [*files_read((origin, job.wanted)), *filter(None, (place.annotations, place.eval_annotations))]
    ctx.with_resource(run_folder(folder, resume=job.training["resume"], force=force, inputs=kept))


def _ready(ctx: typer.Context, job: FinetuneJob, origin: ResolvedSource, folder: Path, out: Output) -> Ready:
    """The data, and the network, converted and calibrated as far as that was asked for."""
    from ...finetuning.finetune import small_batch_note, task_of
    from ...training.distributed import started

    asked = job.training
    task = task_of(job.data.task, **{name: asked[name] for name in LEARNING})
    resumed = folder if asked["resume"] else None
    model, origin, preparation = network_of(job.wanted, origin, job.swap, job.asked, out, resumed)
    preprocess = transform_of(task, preparation)
    sets = job.data.open(task, model, job.wanted.seed)
    if sets.note:
        out.note(sets.note)
    if origin.file is None:
        inputs = task.inputs(sets, preprocess, job.swap.most)
        model = converted(ctx, model, origin, job.swap, inputs, job.asked, out, asked["device"])
    if preprocess is not None:
        remember(model, preparation.settled(getattr(sets.train, "files", ())))
    note = None if asked["freeze_stats"] else small_batch_note(model, asked["batch_size"], started())
    if note is not None:
        out.note(flags.told(note))
    return Ready(model, origin, sets, preprocess)


def _settled_options(ctx: typer.Context) -> dict[str, Any]:
    """The command's options, with the length and the learning rate that it takes where none was given."""
    from ...finetuning.asked import EPOCHS
    from ...finetuning.engine.optimizer import default_rate
    from ...training.distributed import started

    said = ctx.params
    batch = said["batch_size"] * said["accumulate"] * started()
    epochs = None if said["steps"] is not None else said["epochs"] or EPOCHS
    lr = said["lr"] if said["lr"] is not None else default_rate(said["optimizer"], batch)
    return _finetune_report.options_of(ctx, epochs=epochs, lr=lr)


def _trained(
    ctx: typer.Context, job: FinetuneJob, ready: Ready, folder: Path, command: Mapping[str, Any] | None, out: Output
) -> FinetuneReport:
    """Train. command: to be noted in the folder once the run has begun, None for one that goes on."""
    from ...finetuning.finetune import finetune as train_model
    from ...finetuning.output.layout import STATE

    with out.bar("training") as bar:
        try:
            return train_model(
                ready.model, ready.sets, output=folder, preprocess=ready.preprocess, overwrite=True,
                progress=_finetune_report.Teller(bar, folder, command), **job.training,
            )  # fmt: skip
        except Interrupted as stop:
            return stop.report
        except Exception:
            raise
        except BaseException:  # SIGTERM or a second Ctrl-C, after which nobody may wait for a page
            if (folder / STATE).exists():
                ctx.meta[WRITTEN] = folder / STATE
                out.note(f"{folder / STATE} is complete, and the same command with --resume goes on from there")
            raise
