"""`normswap calibrate`: repair a converted network from a few unlabelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError
from . import options
from .boundary import WRITTEN
from .images import Asked, known_inputs, prepare
from .networks import Origin, Wanted, converted_file, locate, open_network
from .output import Output, reporting

if TYPE_CHECKING:
    from torch import nn

    from ..calibration import CalibrationReport
    from .render import Page

IMAGES = 256
STAND_INS = ("photos", "synthetic")  # as in calibration.standins, which imports torch


def calibrate(
    ctx: typer.Context,
    file: options.Converted,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER|photos|synthetic",
            help="Images, alone or in one subfolder for each class; or what stands in for them, see below.",
            show_default=False,
        ),
    ],
    images: Annotated[int, typer.Option(min=1, metavar="N", help="Use at most so many of the images.")] = IMAGES,
    batch_size: options.BatchSize = 32,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="The original network; by default it is rebuilt from FILE.", show_default=False
        ),
    ] = None,
    method: options.Method = "balance",
    size: options.Size = None,
    mean: options.Mean = None,
    std: options.Std = None,
    weights: options.Weights = None,
    arg: options.Arg = None,
    output: options.Output = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
    trust_pickle: options.TrustPickle = False,
    trust_code: options.TrustCode = False,
    allow_nonfinite: options.AllowNonfinite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Set γ and β of the converted norms so that their outputs have the original's mean and variance on your images.

    The images need no labels; with one subfolder for each class the accuracies are reported too. The result goes to
    <FILE>-calibrated.safetensors, or to --output. --weights and --arg are those of --reference.

    Without any images, --data photos takes crops of photographs that come with normswap, and --data synthetic inputs
    made for the network; both say how near they come to what it was trained on. A folder
    of that name goes before.

    \b
    normswap calibrate resnet50-gn.safetensors --data photos/
    normswap calibrate resnet50-gn.safetensors --data synthetic
    """
    asked = Asked.of(ctx, size, mean, std)
    options.choice(ctx, "--method", method, options.METHODS)
    if reference is None and (weights or arg):
        raise options.usage(ctx, "--weights and --arg go with --reference")
    wanted = Wanted(file, trust_code=trust_code, allow_nonfinite=allow_nonfinite, seed=seed)
    original = reference and Wanted(
        reference, weights, tuple(arg or ()), trust_pickle, trust_code, allow_nonfinite, seed
    )
    with reporting(ctx, as_json=json, quiet=quiet, verbose=verbose) as out:
        out.step("loading PyTorch")
        if converted_file(file) is None:
            raise OptionError(
                f"{file} is not a file that normswap wrote",
                hint=f"Convert and calibrate in one go: normswap convert {file} --to gn --calibrate {data}",
            )
        origin = locate(ctx, wanted)
        target = output or Path(file).with_name(f"{Path(file).stem}-calibrated.safetensors")
        from ..checkpoint import save
        from ..writing import check_writable

        check_writable(target, overwrite=force)
        model, origin = open_network(origin, wanted, out)
        teacher = open_network(locate(ctx, original), original, out)[0] if original else None
        report = run(model, teacher, origin, data, images, batch_size, asked, out, method)
        out.step(f"writing {target}")
        save(model, target, overwrite=force)
        ctx.meta[WRITTEN] = target
        out.show(
            lambda: {"network": origin.to_dict(), "output": str(target), **report.to_dict()},
            lambda page: _page(page, report, target),
        )


def run(
    model: nn.Module,
    reference: nn.Module | None,
    origin: Origin,
    data: Path,
    images: int,
    batch_size: int,
    asked: Asked,
    out: Output,
    method: str = "balance",
) -> CalibrationReport:
    """Calibrate `model` in place on a folder of images, prepared as its weights want them, or on stand-ins."""
    from .. import calibration
    from ..conversion import record_of
    from ..data import Batches
    from ..images import open_images

    if stands_in(data):
        if (record := record_of(model)) is not None:
            record.inputs = {**record.inputs, **known_inputs(model, origin, asked)}
        return on_stand_ins(model, reference, str(data), None if images == IMAGES else images, method, out)
    if str(data) in STAND_INS:
        out.note(f"{data} is taken for the folder of that name; normswap's own {data} are for where there is none")
    folder = open_images(data, limit=images)
    if len(folder.files) < images:
        out.note(f"{data} has {len(folder.files)} images, fewer than the {images} asked for")
    preparation = prepare(model, origin, asked)
    batches = folder.batches(preparation.transform, batch_size, stack=preparation.stack)
    tracked = Batches(out.track(batches, len(batches), "calibrating"), folder.classes)
    return calibration.calibrate(model, reference, tracked, method=method)


def stands_in(data: Path) -> bool:
    """Whether it is the word, not a folder."""
    return str(data) in STAND_INS and not data.exists()


def on_stand_ins(
    model: nn.Module, reference: nn.Module | None, kind: str, images: int | None, method: str, out: Output
) -> CalibrationReport:
    """Calibrate `model` in place without the user's images; images: None for the usual number."""
    from .. import calibration

    out.step(f"calibrating on {kind}")
    return calibration.calibrate(model, reference, kind, images=images, method=method)


def figures(report: CalibrationReport) -> list[tuple[str, str]]:
    """The report's figures, one fact each."""
    if not report.layers:
        return [("calibrated", "nothing; " + "; ".join(report.notes))]
    found = [
        ("calibrated", f"{len(report.layers)} layers on {report.images} images"),
        ("moments", f"largest error {report.error_before:.3g}, after {report.error_after:.3g}"),
    ]
    if report.fit:
        found.append(("fit", report.fit))
    if report.drift_before is not None and report.drift_after is not None:
        on = f" (on {report.compared} images)"
        found.append(("output", f"relative error {report.drift_before:.3g}, after {report.drift_after:.3g}{on}"))
    if report.agreement_before is not None and report.agreement_after is not None:
        found.append(("agreement", f"{report.agreement_before:.4f}, after {report.agreement_after:.4f}"))
    if report.accuracy_before is not None and report.accuracy_after is not None:
        before, after = f"{report.accuracy_before:.4f}", f"{report.accuracy_after:.4f}"
        found.append(("accuracy", f"{before}, after {after}; the original {report.accuracy_original:.4f}"))
    return found


def _page(page: Page, report: CalibrationReport, target: Path) -> None:
    from .render import size

    page.facts(*figures(report), indent=0)
    for note in report.notes if report.layers else ():
        page.line(("note: ", "dim"), note)
    page.line(("Written: ", "strong"), (str(target), "path"), f", {size(target.stat().st_size)}")
