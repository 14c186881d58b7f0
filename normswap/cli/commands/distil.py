"""`normswap distil`: train a converted network to give the original's outputs, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...choices import AUGMENTS, PARAMETERS, PRECISIONS
from ...errors import CheckpointError, DataError, Fix, Interrupted, Text, plural
from ..arguments import options
from ..arguments.datasets import images_in
from ..arguments.networks import ResolvedSource, check_converted, named_after, on_device
from ..arguments.pair import OpenedPair, Pair
from ..arguments.preprocessing import PreprocessOverrides, prepare
from ..terminal import flags
from ..terminal.errors import WRITTEN
from ..terminal.output import Output, reporting
from ..terminal.suggestions import naming_the_original

if TYPE_CHECKING:
    from ...data.image_folder import ImageBatches
    from ...distillation.report import DistillationReport
    from ..terminal.render import Page

_AS_GIVEN = "steps batch_size lr temperature features train precision augment seed".split()


def distil(
    ctx: typer.Context,
    file: options.Converted,
    data: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Images, alone or in one subfolder for each class.", show_default=False),
    ],
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Training steps.")] = 300,
    images: options.Images = None,
    batch_size: options.BatchSize = 64,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            min=0,
            metavar="RATE",
            help="Largest step, relative to a parameter's size.",
            show_default="0.02; less below 300 steps",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, metavar="T", help="Temperature of the class scores.")] = 2.0,
    features: Annotated[
        float, typer.Option(min=0, metavar="W", help="Weight of the norms' outputs at first; 0: none.")
    ] = 2.0,
    train: Annotated[str, options.word(PARAMETERS, "All weights, or γ and β of the norms only.")] = "all",
    precision: Annotated[str, options.word(PRECISIONS, "What is computed in on CUDA; a CPU takes fp32.")] = "fp32",
    augment: Annotated[str, options.word(AUGMENTS, "Random changes: mirror and shift, mirror only, or none.")] = "none",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from where an interrupted run stopped.")] = False,
    reference: options.Reference = None,
    size: options.Size = None,
    mean: options.Mean = None,
    std: options.Std = None,
    max_bad: options.MaxBad = 10,
    weights: options.Weights = None,
    arg: options.Arg = None,
    device: options.Device = "auto",
    output: options.Output = None,
    force: options.Force = False,
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
    """Train a converted network to give the outputs of the network it was made from. The images need no labels.

    Best after calibrate. The result goes to <FILE>-distilled.safetensors, or to --output. Ctrl-C writes what was
    reached; the same command with --resume goes on from there. A part of the images is held back to measure on, and the
    state that is nearest to the original on them is what is written. --weights and --arg are those of --reference.

    \b
    normswap distil resnet50-gn-calibrated.safetensors --data photos/ --steps 300
    """
    asked = PreprocessOverrides.of(ctx)
    pair = Pair.of(ctx)
    with reporting(ctx) as out:
        out.step("loading PyTorch")
        check_converted(file, "", f"Convert the network first: normswap convert {file} --to gn")
        target = output or Path(f"{named_after(file)}-distilled.safetensors")
        state = target.with_name(f"{target.name}.training")
        if resume and not state.exists():
            raise CheckpointError(
                f"there is no {state} to resume from", hint=Text("Leave ", Fix("resume"), " out to begin anew.")
            )
        from ...checkpoint.saving import save

        opened = pair.opened(ctx, out, target, overwrite=force or resume)
        found = _trained(ctx, opened, _read(ctx, opened, asked, data, out), state, out)
        out.step(f"writing {target}")
        save(opened.model, target, overwrite=force or resume)
        ctx.meta[WRITTEN] = target
        if not found.interrupted:
            state.unlink(missing_ok=True)
        out.show(
            lambda: opened.written(target) | found.to_dict(),
            lambda page: _page(page, found, opened.teacher_origin, target),
        )
        if found.interrupted:
            raise KeyboardInterrupt


def _read(ctx: typer.Context, opened: OpenedPair, asked: PreprocessOverrides, data: Path, out: Output) -> ImageBatches:
    """The images, in the folder's order: `distil` shuffles them, or one class would come after the other."""
    said = ctx.params
    folder = images_in(data, out, limit=said["images"], train=True)
    preparation = prepare(opened.model, opened.origin, asked)
    _check_batch(said["batch_size"], len(folder.files), data)
    return folder.batches(preparation.transform, said["batch_size"], stack=preparation.stack, max_bad=said["max_bad"])


def _trained(
    ctx: typer.Context, opened: OpenedPair, images: ImageBatches, state: Path, out: Output
) -> DistillationReport:
    """Train. state: the file for the state of the run, from which --resume goes on."""
    from ...distillation.distil import distil as train_model

    model, origin, teacher, _ = opened
    said = ctx.params
    naming = naming_the_original(ctx, origin.source, origin.made_with)
    try:
        with naming, on_device(said["device"], model, teacher), out.bar("distilling") as bar:
            return train_model(
                model, teacher, images, **{name: said[name] for name in _AS_GIVEN},
                progress=lambda now: bar(now.step, now.steps, now.figures()),
                checkpoint=state, resume=state if said["resume"] else None,
            )  # fmt: skip
    except Interrupted as stop:
        return stop.report


def _check_batch(batch_size: int, images: int, data: Path) -> None:
    if images < batch_size:
        raise DataError(
            f"{data} has {plural(images, 'image')}, fewer than a batch of {batch_size}",
            hint=Text("Lower ", Fix("batch_size"), "."),
        )


def _page(page: Page, report: DistillationReport, original: ResolvedSource, target: Path) -> None:
    from ..terminal.render import size

    page.facts(("original", original.told), *report.figures(), indent=0)
    for note in report.notes:
        page.line(("note: ", "dim"), flags.told(note))
    page.skipped(report.bad)
    page.line(("Written: ", "strong"), (str(target), "path"), f", {size(target.stat().st_size)}")
    if report.interrupted:
        page.line(("Next: ", "strong"), "the same command with --resume goes on from there")
