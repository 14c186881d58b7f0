"""`normswap compare`: norms, numbers of groups and batch sizes under equal conditions, in tables and pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...choices import AUGMENTS, NORMS, OPTIMIZERS, TASKS
from ...errors import Interrupted, plural
from ...machine.limits import check_workers
from ..arguments import options
from ..arguments.class_names import class_names
from ..arguments.datasets import DataPlace
from ..arguments.networks import SourceRequest, locate, open_network
from ..arguments.preprocessing import PreprocessOverrides, prepare
from ..terminal import flags
from ..terminal.errors import WRITTEN
from ..terminal.output import reporting

if TYPE_CHECKING:
    from ...sweep.report import ComparisonReport
    from ..terminal.render import Page


def compare(
    ctx: typer.Context,
    source: options.Source,
    data: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|torchvision:NAME",
            help="Labelled data as --task has it, or train and val folders of such; or a data set of torchvision.",
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
    norms: Annotated[
        str | None,
        typer.Option(
            metavar="NORM,NORM", help="The norms.", show_default="bn,gn, and frozen where batch sizes are compared"
        ),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            metavar="N,N|auto", help="Groups of gn.", show_default="1,2,4,8,16,32, or auto where cells are trained"
        ),
    ] = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Train each cell at these batch sizes too.", show_default="no training"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Passes over the images.", show_default="10")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="RATE", help="Largest learning rate, of every cell.", show_default="scaled by the batch"
        ),
    ] = None,
    optimizer: Annotated[str, options.word(OPTIMIZERS, "The optimizer.")] = "adamw",
    calibrate_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Calibrate on so many training images.",
            show_default="256, or 32 with boxes or masks",
        ),
    ] = None,
    augment: Annotated[str, options.word(AUGMENTS, "Random changes: crop and mirror, mirror only, or none.")] = "auto",
    size: options.Size = None,
    mean: options.Mean = None,
    std: options.Std = None,
    max_bad: options.MaxBad = 10,
    data_root: options.DataRoot = Path("data"),
    download: options.Download = False,
    weights: options.Weights = None,
    arg: options.Arg = None,
    device: options.Device = "auto",
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE,DEVICE",
            help="Several, such as cuda:0,cuda:1 or cpu,cpu: each makes one cell at a time, in a process of its own.",
            show_default="one cell after the other, on --device",
        ),
    ] = None,
    workers: options.Workers = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Where all is kept.", show_default="runs/<SOURCE>-compare"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Begin anew in --output, and replace the report.")] = False,
    report: options.Report = None,
    built_by: options.BuiltBy = None,
    trust_pickle: options.TrustPickle = False,
    trust_code: options.TrustCode = False,
    allow_nonfinite: options.AllowNonfinite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Compare norms, numbers of groups and batch sizes on labelled images, with the same seed, order and images seen.

    --task classification compares the accuracy, detection the mAP, segmentation the mean IoU.
    Without --batch-sizes the networks are converted and calibrated only: that figure over the number of groups. With
    it, each cell is a run of finetune too, kept in --output with its curves. Writes table.csv, table.json, table.md
    and pictures. Ctrl-C keeps finished cells; the same command goes on, also with more cells.

    \b
    normswap compare resnet50 --data photos/
    normswap compare resnet50 --data photos/ --norms bn,frozen,gn --batch-sizes 2,4,8,16,32 --epochs 5
    normswap compare fasterrcnn_resnet50_fpn --task detection --data coco/ --devices cuda:0,cuda:1
    """
    place = DataPlace(task, data, eval_data, annotations, eval_annotations, data_root, download)
    place.check(ctx)
    asked = PreprocessOverrides.of(ctx)
    wanted_norms = None if norms is None else _words(ctx, norms)
    counts = None if groups is None else _counts(ctx, "--groups", groups, auto=True)
    sizes = () if batch_sizes is None else _counts(ctx, "--batch-sizes", batch_sizes)
    if not sizes and (epochs is not None or lr is not None):
        raise options.usage(ctx, f"{'--epochs' if epochs is not None else '--lr'} goes with --batch-sizes")
    places = None if devices is None else _devices(ctx, devices, device)
    wanted = SourceRequest.of(ctx, source)
    with reporting(ctx) as out:
        if workers is not None:
            check_workers(workers)
        out.step("loading PyTorch")
        from ...finetuning.finetune import task_of
        from ...sweep.cells import GROUPS, cells_of
        from ...sweep.compare import compare as compare_norms
        from ...sweep.parallel import check_devices

        cells_of(wanted_norms or ["bn"], counts or GROUPS, sizes)  # its checks, before a network is built
        if places is not None:
            check_devices(places)
        model, origin = open_network(locate(ctx, wanted), wanted, out)
        preparation = None if task == "detection" else prepare(model, origin, asked)
        sets = place.open(task_of(task), model, seed)
        folder = output or Path("runs", f"{origin.stem}-compare")
        words: Any = {"task": task, "optimizer": optimizer, "augment": augment, "device": device}
        with out.bar("comparing") as bar:
            try:
                found = compare_norms(
                    model, sets, output=folder, norms=wanted_norms, groups=counts, batch_sizes=sizes, epochs=epochs,
                    lr=lr, images=calibrate_images, class_names=class_names(model, origin), devices=places,
                    preprocess=None if preparation is None else preparation.transform, workers=workers, seed=seed,
                    max_bad=max_bad, overwrite=force, title=origin.stem, progress=bar,
                    source=None if origin.source is None else origin.source.to_dict(), **words,
                )  # fmt: skip
            except Interrupted as stop:
                found = stop.report
        out.show(
            lambda: {"network": origin.to_dict(), "data": data, **found.to_dict()},
            lambda page: _render(page, found),
        )
        if found.interrupted:
            ctx.meta[WRITTEN] = folder / "table.md"
            raise KeyboardInterrupt
        if found.failed and len(found.failed) == len(found.results):
            raise typer.Exit(1)


def _words(ctx: typer.Context, text: str) -> list[str]:
    return [options.choice(ctx, "--norms", word.strip(), NORMS) for word in text.split(",")]


def _counts(ctx: typer.Context, flag: str, text: str, *, auto: bool = False) -> list[Any]:
    try:
        found = ["auto" if auto and part.strip() == "auto" else int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if any(count != "auto" and int(count) < 1 for count in found):
        raise typer.BadParameter(f"{text!r} is not like 1,2,4", ctx=ctx, param_hint=flag)
    return found


def _devices(ctx: typer.Context, text: str, device: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    wrong = next((name for name in names if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name)), None)
    if wrong is not None:
        raise typer.BadParameter(f"{wrong!r} is not like cuda:0,cuda:1 or cpu,cpu", ctx=ctx, param_hint="--devices")
    if device != "auto":
        raise options.usage(ctx, "--device and --devices exclude each other")
    return names


def _render(page: Page, report: ComparisonReport) -> None:
    table = report.table()
    page.table(table.columns, table.rows)
    page.gap()
    if report.rests_on:
        page.line((report.rests_on, "dim"))
    for note in report.notes:
        page.line(("note: ", "dim"), flags.told(note))
    if report.failed:
        page.line((f"{plural(len(report.failed), 'cell')} failed; the same command tries again", "bad"))
    from ...sweep.report import TABLES

    names = ", ".join([*TABLES, *(path.name for path in report.pictures)])
    page.line(("Written: ", "strong"), (str(report.folder), "path"), f": {names}")
    if report.interrupted:
        page.line(("Next: ", "strong"), "the same command goes on from there")
