"""`normswap calibrate`: repair a converted network from a few unlabelled images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ...errors import plural
from ..arguments import options
from ..arguments.networks import (
    ResolvedSource,
    SourceRequest,
    check_converted,
    files_read,
    locate,
    on_device,
    open_network,
    open_original,
    restored,
)
from ..arguments.preprocessing import PreprocessOverrides, prepare
from ..terminal import flags
from ..terminal.errors import WRITTEN
from ..terminal.output import Output, reporting
from ..terminal.suggestions import naming_the_original

if TYPE_CHECKING:
    from torch import nn

    from ...calibration.report import CalibrationReport
    from ...data.batches import Batches
    from ...planning.plan import Plan
    from ..terminal.render import Page

IMAGES = 256
BUDGET = 0.01


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on, and how. max_bad: so many images that cannot be read are skipped.

    budget: how much of the output each layer may change when its number of groups is chosen; None to choose none.
    """

    data: Path
    images: int
    asked: PreprocessOverrides
    method: str = "balance"
    batch_size: int = 32
    device: str = "auto"
    max_bad: int = 10
    budget: float | None = None


def calibrate(
    ctx: typer.Context,
    file: options.Converted,
    data: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Images, alone or in one subfolder for each class.", show_default=False),
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
    max_bad: options.MaxBad = 10,
    weights: options.Weights = None,
    arg: options.Arg = None,
    device: options.Device = "auto",
    output: options.Output = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
    built_by: options.BuiltBy = None,
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

    \b
    normswap calibrate resnet50-gn.safetensors --data photos/
    """
    asked = PreprocessOverrides.of(ctx, size, mean, std)
    if reference is None and (weights or arg):
        raise options.usage(ctx, "--weights and --arg go with --reference")
    wanted = SourceRequest(file, None, (), False, trust_code, allow_nonfinite, seed, built_by)
    original = reference and SourceRequest(
        reference, weights, tuple(arg or ()), trust_pickle, trust_code, allow_nonfinite, seed
    )
    with reporting(ctx, as_json=json, quiet=quiet, verbose=verbose) as out:
        out.step("loading PyTorch")
        way = f"Convert and calibrate in one go: normswap convert {file} --to gn --calibrate {data}"
        check_converted(file, "", way)
        origin = locate(ctx, wanted)
        other = (locate(ctx, original), original) if original else None
        target = output or Path(file).with_name(f"{Path(file).stem}-calibrated.safetensors")
        from ...checkpoint.saving import save
        from ...files.writing import reserved

        ctx.with_resource(reserved(target, overwrite=force, inputs=files_read((origin, wanted), other)))
        model, origin = open_network(origin, wanted, out)
        teacher, named = open_original(ctx, other[1], origin, wanted, out) if other else (None, restored(origin))
        with naming_the_original(ctx, origin.source, origin.made_with):
            wish = Calibration(data, images, asked, method, batch_size, device, max_bad)
            report = run(model, teacher, origin, wish, out)
        out.step(f"writing {target}")
        save(model, target, overwrite=force)
        ctx.meta[WRITTEN] = target
        out.show(
            lambda: {
                "network": origin.to_dict(),
                "reference": named.to_dict(),
                "output": str(target),
                **report.to_dict(),
            },
            lambda page: _page(page, report, named, target),
        )


def run(
    model: nn.Module,
    reference: nn.Module | None,
    origin: ResolvedSource,
    wish: Calibration,
    out: Output,
) -> CalibrationReport:
    """Calibrate `model` in place on a folder of images, prepared as its weights want them. It ends on the CPU."""
    from ...calibration import calibrate as calibration

    batches, method = _batches(model, origin, wish, out), cast(Any, wish.method)
    with on_device(wish.device, model, reference), out.bar("calibrating") as bar:
        return calibration.calibrate(model, reference, batches, method=method, progress=bar)


def estimate(model: nn.Module, origin: ResolvedSource, wish: Calibration, out: Output) -> CalibrationReport:
    """Estimate the running statistics of `model` in place, on a folder of images prepared as its weights want them."""
    from ...calibration import calibrate as calibration

    batches = _batches(model, origin, wish, out)
    with on_device(wish.device, model), out.bar("estimating running statistics") as bar:
        return calibration.estimate_statistics(model, batches, progress=bar)


def _batches(model: nn.Module, origin: ResolvedSource, wish: Calibration, out: Output) -> Batches:
    from ...data.batches import Batches
    from ...data.image_folder import open_images

    folder = open_images(wish.data, limit=wish.images)
    if len(folder.files) < wish.images:
        there = plural(len(folder.files), "image")
        out.note(f"{wish.data} has {there}, fewer than the {wish.images} asked for")
    preparation = prepare(model, origin, wish.asked)
    read = folder.batches(preparation.transform, wish.batch_size, stack=preparation.stack, max_bad=wish.max_bad)
    return Batches(read, folder.classes)


def with_groups(model: nn.Module, made: Plan, origin: ResolvedSource, wish: Calibration, out: Output) -> Plan:
    """The plan with the numbers of groups that the layers bear on the first images."""
    from ...calibration.choosing import IMAGES, choose_groups

    count = min(IMAGES, wish.images)
    batches = _batches(model, origin, replace(wish, images=count, batch_size=count), out)
    out.step("choosing groups")
    with on_device(wish.device, model):
        return choose_groups(model, made, batches, budget=BUDGET if wish.budget is None else wish.budget)


def figures(report: CalibrationReport) -> list[tuple[str, str]]:
    """The report's figures, one fact each."""
    from ...errors import plural

    if not report.layers:
        return [("calibrated", "nothing; " + "; ".join(report.notes))]
    found = [
        ("calibrated", f"{plural(len(report.layers), 'layer')} on {plural(report.images, 'image')}"),
        ("moments", f"largest error {report.error_before:.3g}, after {report.error_after:.3g}"),
    ]
    on = f"on {plural(report.compared, 'image')} that it was calibrated on"
    if report.drift_before is not None and report.drift_after is not None:
        found.append(("output", f"relative error {report.drift_before:.3g}, after {report.drift_after:.3g}, {on}"))
    if report.agreement_before is not None and report.agreement_after is not None:
        found.append(("agreement", f"{report.agreement_before:.4f}, after {report.agreement_after:.4f}, {on}"))
    if report.accuracy_before is not None and report.accuracy_after is not None:
        before, after = f"{report.accuracy_before:.4f}", f"{report.accuracy_after:.4f}"
        found.append(("accuracy", f"{before}, after {after}; the original {report.accuracy_original:.4f}; {on}"))
    return found


def _page(page: Page, report: CalibrationReport, original: ResolvedSource, target: Path) -> None:
    from ..terminal.render import size

    page.facts(("original", original.told), *figures(report), indent=0)
    for note in report.notes if report.layers else ():
        page.line(("note: ", "dim"), flags.told(note))
    page.skipped(report.bad)
    page.line(("Written: ", "strong"), (str(target), "path"), f", {size(target.stat().st_size)}")
