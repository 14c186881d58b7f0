"""`normswap calibrate`: repair a converted network from a few unlabelled images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ...choices import STAND_INS
from ...errors import DataError, plural
from ..arguments import options
from ..arguments.datasets import images_in
from ..arguments.networks import ResolvedSource, check_converted, named_after, on_device
from ..arguments.options import stands_in
from ..arguments.pair import Pair
from ..arguments.preprocessing import PreprocessOverrides, known_inputs, prepare
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
_AT_ONCE = 32  # stand-ins to choose groups on


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on, and how.

    data: a folder, or a word for what stands in for it. images: at most so many; None for as many as are usual.
    max_bad: so many images that cannot be read are skipped. budget: how much of the output each layer may change when
    its number of groups is chosen; None to choose none. seed: of stand-ins. counted: whether `images` is what the user
    asked for.
    """

    data: str
    images: int | None
    asked: PreprocessOverrides
    method: str = "refit"
    batch_size: int = 32
    device: str = "auto"
    max_bad: int = 10
    budget: float | None = None
    seed: int = 0
    counted: bool = True

    @property
    def stands_in(self) -> bool:
        """Whether there are no images of the user's."""
        return stands_in(self.data)


def calibrate(
    ctx: typer.Context,
    file: options.Converted,
    data: Annotated[
        str,
        typer.Option(
            metavar=f"FOLDER|{options.STAND_IN}",
            help="Images, alone or in one subfolder for each class; or what stands in for them, see below.",
            show_default=False,
        ),
    ],
    images: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Use at most so many of the images.", show_default="256, or 64 to 256 stand-ins"
        ),
    ] = None,
    batch_size: options.BatchSize = 32,
    reference: options.Reference = None,
    method: options.Method = "refit",
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
    """Set γ and β of the converted norms so that their outputs have the original's mean and variance on your images.

    The images need no labels; with one subfolder for each class the accuracies are reported too. The result goes to
    <FILE>-calibrated.safetensors, or to --output. --weights and --arg are those of --reference.

    Without any images, --data photos takes crops of photographs that come with normswap, and --data synthetic inputs
    made for the network; both say how near they come to what it was trained on. A folder of that name goes before.

    \b
    normswap calibrate resnet50-gn.safetensors --data photos/
    normswap calibrate resnet50-gn.safetensors --data synthetic
    """
    asked = PreprocessOverrides.of(ctx)
    pair = Pair.of(ctx)
    with reporting(ctx) as out:
        out.step("loading PyTorch")
        way = f"Convert and calibrate in one go: normswap convert {file} --to gn --calibrate {data}"
        check_converted(file, "", way)
        target = output or Path(f"{named_after(file)}-calibrated.safetensors")
        from ...checkpoint.saving import save

        opened = pair.opened(ctx, out, target, overwrite=force)
        model, origin, teacher, _ = opened
        with naming_the_original(ctx, origin.source, origin.made_with):
            wish = Calibration(data, images, asked, method, batch_size, device, max_bad, seed=seed)
            found = run(model, teacher, origin, wish, out)
        out.step(f"writing {target}")
        save(model, target, overwrite=force)
        ctx.meta[WRITTEN] = target
        out.show(
            lambda: opened.written(target) | found.to_dict(),
            lambda page: _page(page, found, opened.teacher_origin, target),
        )


def run(
    model: nn.Module,
    reference: nn.Module | None,
    origin: ResolvedSource,
    wish: Calibration,
    out: Output,
    inputs: Any = None,
) -> CalibrationReport:
    """Calibrate `model` in place, on images prepared as its weights want them or on stand-ins. It ends on the CPU.

    inputs: what --input gives, if anything.
    """
    from ...calibration.calibrate import calibrate as calibrate_model
    from ...conversion.record import record_of

    if (record := record_of(model)) is not None:
        record.inputs = {**record.inputs, **known_inputs(model, origin, wish.asked)}
    data: Any = wish.data
    images, method = wish.images, cast(Any, wish.method)
    if not wish.stands_in:
        if data in STAND_INS:
            out.note(f"{data} is taken for the folder of that name, not for normswap's own {data}")
        data, found = _batches(model, origin, wish, out)
        images = None if images is None else found  # a folder that holds fewer is told, and will do
    with on_device(wish.device, model, reference), out.bar("calibrating") as bar:
        given = None if record is not None and "shape" in record.inputs else inputs  # --size may say another
        return calibrate_model(
            model, reference, data, images=images, method=method, example_inputs=given, seed=wish.seed, progress=bar
        )


def estimate(model: nn.Module, origin: ResolvedSource, wish: Calibration, out: Output) -> CalibrationReport:
    """Estimate the running statistics of `model` in place, on a folder of images prepared as its weights want them."""
    from ...calibration.calibrate import estimate_statistics

    batches, images = _batches(model, origin, wish, out)
    with on_device(wish.device, model), out.bar("estimating running statistics") as bar:
        return estimate_statistics(model, batches, images=images, progress=bar)


def _batches(model: nn.Module, origin: ResolvedSource, wish: Calibration, out: Output) -> tuple[Batches, int]:
    """The images of a folder, and how many they are."""
    from ...data.batches import Batches

    place, images = Path(wish.data), wish.images or IMAGES
    if not place.exists():
        words = " and ".join(STAND_INS)
        raise DataError(f"there is no folder {place}", hint=f"Give a folder of images; {words} stand in for one.")
    folder = images_in(place, out, limit=images, train=True)
    if wish.counted and wish.images is not None and len(folder.files) < images:
        out.note(f"{place} has {plural(len(folder.files), 'image')}, fewer than the {images} asked for")
    preparation = prepare(model, origin, wish.asked)
    read = folder.batches(preparation.transform, wish.batch_size, stack=preparation.stack, max_bad=wish.max_bad)
    return Batches(read, folder.classes), len(folder.files)


def with_groups(
    model: nn.Module, made: Plan, origin: ResolvedSource, wish: Calibration, out: Output, inputs: Any = None
) -> Plan:
    """The plan with the numbers of groups that the layers bear on the first images. inputs: as in `run`."""
    from ...calibration.group_count import IMAGES, choose_groups
    from ...calibration.stand_ins import stand_ins

    out.step("choosing groups")
    with on_device(wish.device, model):
        if wish.stands_in:
            known = known_inputs(model, origin, wish.asked)
            given = None if "shape" in known else inputs
            made_for: dict[str, Any] = {"images": _AT_ONCE, "remembered": known, "seed": wish.seed}
            batches: Any = stand_ins(wish.data, model, given, **made_for).batches
        else:
            count = min(IMAGES, wish.images or IMAGES)
            batches, _ = _batches(model, origin, replace(wish, images=count, batch_size=count, counted=False), out)
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
    if report.fit:
        found.append(("fit", report.fit))
    if report.drift_before is not None and report.drift_after is not None:
        found.append(("output", f"relative error {report.drift_before:.3g}, after {report.drift_after:.3g}, {on}"))
    if report.agreement_before is not None and report.agreement_after is not None:
        found.append(("agreement", f"{report.agreement_before:.4f}, after {report.agreement_after:.4f}, {on}"))
    if report.accuracy_before is not None and report.accuracy_after is not None:
        before, after = f"{report.accuracy_before:.4f}", f"{report.accuracy_after:.4f}"
        found.append(("accuracy", f"{before}, after {after}; the original {report.accuracy_original:.4f}; {on}"))
    if len(found) > 2 and report.compared and not report.stand_ins:
        found.append(("on others", "it may do less well than on these: normswap verify --data with other images tells"))
    return found


def _page(page: Page, report: CalibrationReport, original: ResolvedSource, target: Path) -> None:
    from ..terminal.render import size

    page.facts(("original", original.told), *figures(report), indent=0)
    for note in report.notes if report.layers else ():
        page.line(("note: ", "dim"), flags.told(note))
    page.skipped(report.bad)
    page.line(("Written: ", "strong"), (str(target), "path"), f", {size(target.stat().st_size)}")
