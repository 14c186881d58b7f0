"""`normswap finetune`: train a converted network on labelled images; convert and calibrate it first, if asked to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...choices import AUGMENTS, OPTIMIZERS, PARAMETERS, PRECISIONS, TASKS
from ...errors import Interrupted
from ...machine.limits import check_workers
from ..arguments import options
from ..arguments.datasets import DataPlace
from ..arguments.networks import SourceRequest, files_read, locate
from ..arguments.preprocessing import PreprocessOverrides
from ..terminal import flags
from ..terminal.errors import WRITTEN
from ..terminal.output import Output, reporting
from . import _finetune_report
from ._finetune_network import ConversionRequest, converted, network_of, stem_of, transform_of

if TYPE_CHECKING:
    from torch import nn


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
        options.word(TASKS, "One subfolder for each class; COCO boxes and masks; or a mask beside each image."),
    ] = "classification",
    eval_data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="What to validate on.", show_default="val/ in --data, or a tenth of it"),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="COCO's JSON file, where --data is its images.", show_default=False),
    ] = None,
    eval_annotations: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The same for --eval-data, or more of --data.", show_default=False),
    ] = None,
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
            help="Convert to this norm first, and calibrate on the training images.",
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
            show_default="256, or 32 with boxes or masks, or 64 synthetic ones",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Largest learning rate.", show_default="scaled by the global batch"),
    ] = None,
    optimizer: Annotated[str, options.word(OPTIMIZERS, "The optimizer.")] = "adamw",
    weight_decay: Annotated[
        float, typer.Option(min=0, metavar="VALUE", help="Decay of weights; γ, β and biases do not decay.")
    ] = 0.01,
    warmup: Annotated[float, typer.Option(metavar="SHARE", help="Share of the steps in which the rate rises.")] = 0.05,
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
    data_root: Annotated[Path, typer.Option(metavar="FOLDER", help="Where torchvision's data sets are stored.")] = Path(
        "data"
    ),
    download: Annotated[bool, typer.Option("--download", help="Fetch torchvision's data set.")] = False,
    device: options.Device = "auto",
    precision: Annotated[str, options.word(PRECISIONS, "What is computed in.")] = "fp32",
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last/--channels-first", help="Memory layout.", show_default="by device")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network with torch.compile.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Processes that read images.", show_default="by device")
    ] = None,
    max_bad: options.MaxBad = 10,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where the run is kept.", show_default="runs/<SOURCE>"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run in --output.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's files too.")] = False,
    weights: options.Weights = None,
    arg: options.Arg = None,
    built_by: options.BuiltBy = None,
    trust_pickle: options.TrustPickle = False,
    trust_code: options.TrustCode = False,
    allow_nonfinite: options.AllowNonfinite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a network on labelled images, boxes or masks, at small batches. With --to, convert and calibrate it first.

    --task detection reads FOLDER/annotations.json with FOLDER/images, train and val folders of such, COCO's own
    layout, or --annotations FILE. --task segmentation reads images/ and masks/, or NAME_mask.png beside each image.
    Writes to the folder runs/<SOURCE>, or --output: best.safetensors and last.safetensors, metrics.jsonl and
    curves.png, and after every epoch the state from which --resume goes on. Ctrl-C saves it too. For many GPUs:
    torchrun --nproc-per-node=N -m normswap finetune ...

    \b
    normswap finetune resnet50 --to gn --data photos/ --batch-size 2
    normswap finetune resnet50-gn.safetensors --data torchvision:CIFAR10 --download --epochs 5
    normswap finetune fasterrcnn_resnet50_fpn_v2 --task detection --data coco/ --rule 'role:head=gn' --batch-size 1
    """
    words: Any = {"task": task, "optimizer": optimizer, "precision": precision, "augment": augment, "device": device}
    if epochs is not None and steps is not None:
        raise options.usage(ctx, "--epochs and --steps exclude each other")
    planning = {
        "groups": options.groups(ctx, groups),
        "channels_per_group": channels_per_group,
        "indivisible": indivisible,
    }
    swap = ConversionRequest(
        to,
        options.rules(ctx, rule),
        planning,
        calibrate_images,
        256 if task == "classification" else 32,
        calibrate=calibrate != "none",
        place=options.calibration(ctx, calibrate),
    )
    place = DataPlace(task, data, eval_data, annotations, eval_annotations, data_root, download)
    place.check(ctx)
    if not swap.wanted and (groups is not None or channels_per_group is not None):
        raise options.usage(ctx, "--groups and --channels-per-group go with --to or --rule")
    if groups is not None and channels_per_group is not None:
        raise options.usage(ctx, "--groups and --channels-per-group exclude each other")
    if ema_decay is not None and not ema:
        raise options.usage(ctx, "--ema-decay goes with --ema")
    decay = 0.999 if ema_decay is None else ema_decay
    if resume and force:
        raise options.usage(ctx, "--resume and --force exclude each other")
    asked = PreprocessOverrides.of(ctx, size, mean, std)
    if task == "detection" and asked.given():
        raise options.usage(
            ctx, "detectors resize and normalise their images themselves: leave --size, --mean and --std out"
        )
    wanted = SourceRequest(source, weights, tuple(arg or ()), trust_pickle, trust_code, allow_nonfinite, seed, built_by)
    helper = os.environ.get("RANK", "0") != "0"  # one of torchrun's processes, whose first one does the talking
    with reporting(ctx, as_json=json and not helper, quiet=quiet or helper, verbose=verbose and not helper) as out:
        if workers is not None:
            check_workers(workers)
        out.step("loading PyTorch")
        from ...finetuning.engine.optimizer import default_rate
        from ...finetuning.finetune import EPOCHS, task_of
        from ...finetuning.finetune import finetune as train_model
        from ...finetuning.output.layout import STATE, check_outside, run_folder

        swap.check()
        origin = locate(ctx, wanted)
        folder = output or Path("runs", stem_of(origin, swap))
        if not helper:
            check_outside(folder, (Path(data), eval_data, swap.folder))
            kept = [*files_read((origin, wanted)), *filter(None, (annotations, eval_annotations))]
            ctx.with_resource(run_folder(folder, resume=resume, force=force, inputs=kept))
        doing = task_of(task, label_smoothing=label_smoothing, distil=distil)
        command = swap.described(origin, asked)
        if resume:
            _finetune_report.keep_command(folder, command, resume=True)
        model, origin, preparation = network_of(wanted, origin, swap, asked, out, folder if resume else None)
        sets = place.open(doing, model, seed)
        if sets.note:
            out.note(sets.note)
        if origin.file is None:
            inputs = doing.inputs(sets, transform_of(doing, preparation), swap.most)
            model = converted(ctx, model, origin, swap, inputs, asked, out, device)
        _warn(model, batch_size, freeze_stats, out)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        used = _finetune_report.options_of(
            ctx,
            epochs=None if steps is not None else epochs or EPOCHS,
            lr=lr if lr is not None else default_rate(optimizer, batch_size * accumulate * processes),
        )
        ctx.meta[WRITTEN] = None
        with out.bar("training") as bar:
            try:
                report = train_model(
                    model, sets, output=folder, **words, batch_size=batch_size, epochs=epochs, steps=steps,
                    accumulate=accumulate, lr=lr, weight_decay=weight_decay, warmup=warmup,
                    clip_grad=clip_grad or None,
                    stabilize=not no_stabilize, train=train, freeze_stats=freeze_stats, freeze_affine=freeze_affine,
                    distil=distil, ema=decay if ema else 0.0, label_smoothing=label_smoothing,
                    num_classes=num_classes, preprocess=transform_of(doing, preparation),
                    channels_last=channels_last, compile=compile,
                    workers=workers, seed=seed, max_bad=max_bad, tensorboard=tensorboard, resume=resume, overwrite=True,
                    progress=_finetune_report.Teller(bar, folder, None if resume else {**command, "options": used}),
                )  # fmt: skip
            except Interrupted as stop:
                report = stop.report
            except Exception:
                raise
            except BaseException:  # SIGTERM or a second Ctrl-C, after which nobody may wait for a page
                if (folder / STATE).exists():
                    ctx.meta[WRITTEN] = folder / STATE
                    out.note(f"{folder / STATE} is complete, and the same command with --resume goes on from there")
                raise
        out.show(
            lambda: {"network": origin.to_dict(), "output": str(folder), **report.to_dict()},
            lambda page: _finetune_report.show(page, report, folder, origin),
        )
        if report.interrupted:
            ctx.meta[WRITTEN] = folder / STATE
            raise KeyboardInterrupt


def _warn(model: nn.Module, batch_size: int, freeze_stats: bool, out: Output) -> None:
    from ...finetuning.finetune import small_batch_note

    note = None if freeze_stats else small_batch_note(model, batch_size, int(os.environ.get("WORLD_SIZE", "1")))
    if note is not None:
        out.note(flags.told(note))
