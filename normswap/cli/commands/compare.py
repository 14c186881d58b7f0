"""`normswap compare`: norms, numbers of groups and batch sizes under equal conditions, in tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...choices import AUGMENTS, NORMS, OPTIMIZERS
from ...errors import Interrupted, plural
from ...machine.limits import check_workers
from ..arguments import options
from ..arguments.networks import SourceRequest, locate, open_network
from ..arguments.preprocessing import PreprocessOverrides, prepare
from ..terminal.errors import WRITTEN
from ..terminal.output import reporting

if TYPE_CHECKING:
    from ...sweep.report import ComparisonReport
    from ..terminal.render import Page


def compare(
    ctx: typer.Context,
    source: options.Source,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="One subfolder of images for each class, or train and val folders of such.",
            show_default=False,
        ),
    ],
    eval_data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="What to validate on.", show_default="val/ in --data, or a tenth of it"),
    ] = None,
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
        typer.Option(metavar="RATE", help="Largest learning rate, of every cell.", show_default="scaled by the batch"),
    ] = None,
    optimizer: Annotated[str, options.word(OPTIMIZERS, "The optimizer.")] = "adamw",
    calibrate_images: Annotated[
        int, typer.Option(min=1, metavar="N", help="Calibrate on so many training images.")
    ] = 256,
    augment: Annotated[str, options.word(AUGMENTS, "Random changes: crop and mirror, mirror only, or none.")] = "auto",
    size: options.Size = None,
    mean: options.Mean = None,
    std: options.Std = None,
    max_bad: options.MaxBad = 10,
    weights: options.Weights = None,
    arg: options.Arg = None,
    device: options.Device = "auto",
    workers: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Processes that read images.", show_default="by device")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Where all is kept.", show_default="runs/<SOURCE>-compare"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Begin anew in --output.")] = False,
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

    Without --batch-sizes the networks are converted and calibrated only: accuracy over the number of groups. With it,
    each cell is a run of finetune too, kept in --output with its curves. Writes table.csv, table.json, table.md and
    pictures. Ctrl-C keeps finished cells; the same command goes on, also with more cells.

    \b
    normswap compare resnet50 --data photos/
    normswap compare resnet50 --data photos/ --norms bn,frozen,gn --batch-sizes 2,4,8,16,32 --epochs 5
    """
    asked = PreprocessOverrides.of(ctx)
    wanted_norms = None if norms is None else _words(ctx, norms)
    counts = None if groups is None else _counts(ctx, "--groups", groups, auto=True)
    sizes = () if batch_sizes is None else _counts(ctx, "--batch-sizes", batch_sizes)
    if not sizes and (epochs is not None or lr is not None):
        raise options.usage(ctx, f"{'--epochs' if epochs is not None else '--lr'} goes with --batch-sizes")
    wanted = SourceRequest.of(ctx, source)
    with reporting(ctx) as out:
        if workers is not None:
            check_workers(workers)
        out.step("loading PyTorch")
        from ...sweep.compare import compare as compare_norms

        model, origin = open_network(locate(ctx, wanted), wanted, out)
        preparation = prepare(model, origin, asked)
        folder = output or Path("runs", f"{origin.stem}-compare")
        words: Any = {"optimizer": optimizer, "augment": augment, "device": device}
        with out.bar("comparing") as bar:
            try:
                report = compare_norms(
                    model, data, eval_data, output=folder, norms=wanted_norms, groups=counts, batch_sizes=sizes,
                    epochs=epochs, lr=lr, images=calibrate_images, preprocess=preparation.transform, workers=workers,
                    seed=seed, max_bad=max_bad, overwrite=force, title=origin.stem, progress=bar,
                    source=None if origin.source is None else origin.source.to_dict(), **words,
                )  # fmt: skip
            except Interrupted as stop:
                report = stop.report
        out.show(
            lambda: {"network": origin.to_dict(), **report.to_dict()},
            lambda page: _render(page, report),
        )
        if report.interrupted:
            ctx.meta[WRITTEN] = folder / "table.md"
            raise KeyboardInterrupt
        if report.failed and len(report.failed) == len(report.results):
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


def _render(page: Page, report: ComparisonReport) -> None:
    table = report.table()
    page.table(table.columns, table.rows)
    page.gap()
    if report.failed:
        page.line((f"{plural(len(report.failed), 'cell')} failed; the same command tries again", "bad"))
    from ...sweep.report import TABLES

    names = ", ".join([*TABLES, *(path.name for path in report.pictures)])
    page.line(("Written: ", "strong"), (str(report.folder), "path"), f": {names}")
    if report.interrupted:
        page.line(("Next: ", "strong"), "the same command goes on from there")
