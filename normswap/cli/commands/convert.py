"""`normswap convert`: the main job. Build, plan, convert, prove, save."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...choices import NORMS, TRANSFERS
from ..arguments import options
from ..arguments.networks import (
    ResolvedSource,
    SourceRequest,
    check_converted,
    example_inputs,
    files_read,
    locate,
    open_network,
    original_of,
)
from ..arguments.preprocessing import PreprocessOverrides
from ..terminal.errors import WRITTEN
from ..terminal.output import Output, reporting
from ..terminal.suggestions import building, command, with_commands
from ._calibration_trial import tried
from ._convert_report import Result, show
from ._estimate_statistics import mend_statistics
from .calibrate import BUDGET, Calibration, with_groups
from .calibrate import run as run_calibration

if TYPE_CHECKING:
    from torch import nn

    from ...conversion.record import Record

ORIGINAL = "original"
_PICKLES = (".pth", ".pt", ".th", ".ckpt", ".pkl", ".bin")


@dataclass(frozen=True)
class Job:
    """What was asked of the conversion itself. planning: arguments of `normswap.plan`.

    trial: whether to try what calibration would gain, where none is asked for.
    """

    to: str | None
    rules: list[tuple[str, str]]
    planning: dict[str, Any]
    shapes: list[tuple[int, ...]]
    check: bool
    undo: bool
    approximate: bool
    dry_run: bool
    output: Path | None
    force: bool
    calibration: Calibration | None
    trial: bool = True


def convert(
    ctx: typer.Context,
    source: options.Source,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="NORM",
            help=f"The norm to convert to: {', '.join(NORMS)}; or original, to undo a conversion.",
            autocompletion=options.target_names,
            show_default=False,
        ),
    ] = None,
    groups: options.Groups = None,
    channels_per_group: options.ChannelsPerGroup = None,
    indivisible: options.Indivisible = "error",
    transfer: Annotated[
        str,
        options.word(TRANSFERS, "fold carries the running statistics over, copy only γ and β, reset nothing."),
    ] = "fold",
    eps: Annotated[
        str | None,
        typer.Option(
            metavar="VALUE|auto",
            help="eps of the new norms; fold scales γ by √(1 + eps). auto takes 1 where the input is standardised, and "
            "leaves it to --calibrate.",
            show_default="auto",
        ),
    ] = None,
    zero_init_residual: Annotated[
        bool,
        typer.Option(
            "--zero-init-residual", help="γ = 0 in the last norm of each residual branch, to train from there."
        ),
    ] = False,
    rule: options.Rule = None,
    sources: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="NORM",
            help="Convert layers of this type only; repeatable. By default all with batch statistics.",
            autocompletion=options.norm_names,
            show_default=False,
        ),
    ] = None,
    weights: options.Weights = None,
    arg: options.Arg = None,
    input_shape: options.Input = None,
    calibrate: options.Calibrate = None,
    calibrate_images: options.CalibrateImages = None,
    method: options.Method = "refit",
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="DRIFT",
            help="With --groups auto and --calibrate: as many groups as each layer bears if it alone may change the "
            "output by this share.",
            show_default="0.01",
        ),
    ] = None,
    size: options.Size = None,
    mean: options.Mean = None,
    std: options.Std = None,
    max_bad: options.MaxBad = 10,
    device: options.Device = "auto",
    no_check: Annotated[bool, typer.Option("--no-check", help="Skip the self-check.")] = False,
    no_undo: Annotated[
        bool, typer.Option("--no-undo", help="Keep nothing to undo the conversion with; the file is a little smaller.")
    ] = False,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Undo a conversion although the network was trained since.")
    ] = False,
    output: options.Output = None,
    force: options.Force = False,
    report: options.Report = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change and write nothing.")] = False,
    built_by: options.BuiltBy = None,
    trust_pickle: options.TrustPickle = False,
    trust_code: options.TrustCode = False,
    allow_nonfinite: options.AllowNonfinite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Replace the norm layers of a network, carry over what they have learned, and write the result to a file.

    \b
    normswap convert resnet50 --to gn --groups 32
    normswap convert resnet50 --to gn --groups 32 --calibrate photos/
    normswap convert resnet50 --rule 'layer4.*=frozen' --rule '*=gn'
    normswap convert fasterrcnn_resnet50_fpn_v2 --rule 'role:backbone=frozen' --rule 'role:head=gn'
    normswap convert nets.py:build --arg width=64 --weights mine.pth --to ln
    normswap convert resnet50-gn.safetensors --to original
    """
    place = options.calibration(ctx, calibrate)
    planning = {
        "groups": options.groups(ctx, groups),
        "channels_per_group": channels_per_group,
        "indivisible": indivisible,
        "transfer": transfer,
        "eps": options.eps(ctx, eps) or "auto",
        "sources": sources or None,
        "zero_init_residual": zero_init_residual,
        "missing_statistics": "error" if place is None or options.stands_in(place) else "later",
    }
    asked = PreprocessOverrides.of(ctx)
    if place is None and (calibrate_images is not None or method != "refit" or budget is not None or asked.given()):
        raise options.usage(ctx, "--calibrate-images, --method, --budget, --size, --mean and --std go with --calibrate")
    if budget is not None and (groups not in (None, "auto") or channels_per_group is not None):
        raise options.usage(ctx, "--budget chooses the number of groups; it goes with --groups auto")
    wish = None
    if place is not None:
        choosing = groups == "auto" or budget is not None
        wish = Calibration(
            place,
            calibrate_images,
            asked,
            method,
            device=device,
            max_bad=max_bad,
            budget=budget or BUDGET if choosing else None,
            seed=seed,
        )
    job = Job(
        to,
        options.rules(ctx, rule),
        planning,
        options.shapes(ctx, input_shape),
        check=not no_check,
        undo=not no_undo,
        approximate=approximate,
        dry_run=dry_run,
        output=output,
        force=force,
        calibration=wish,
        trial=calibrate is None,
    )
    _check_combination(ctx, job)
    wanted = SourceRequest.of(ctx, source)
    with reporting(ctx) as out:
        out.step("loading PyTorch")
        result = (_revert if to == ORIGINAL else _convert)(ctx, wanted, job, out)
        out.show(result.to_dict, lambda page: show(page, result))


def _check_combination(ctx: typer.Context, job: Job) -> None:
    """What is a contradiction whatever the network is an error of the call."""
    if job.to is None and not job.rules:
        norms = ", ".join(NORMS)
        raise options.usage(ctx, f"say what to convert to, with --to NORM or --rule PATTERN=NORM; norms: {norms}")
    if job.planning["groups"] is not None and job.planning["channels_per_group"] is not None:
        raise options.usage(ctx, "--groups and --channels-per-group exclude each other")
    if job.to != ORIGINAL:
        if job.approximate:
            raise options.usage(ctx, "--approximate goes with --to original")
        return
    usual = {
        "indivisible": "error",
        "transfer": "fold",
        "eps": "auto",
        "missing_statistics": job.planning["missing_statistics"],
    }
    given = [name for name, value in job.planning.items() if value not in (None, False, usual.get(name))]
    flags = ["--" + {"sources": "from"}.get(name, name.replace("_", "-")) for name in given]
    flags += ["--rule"] if job.rules else []
    flags += ["--calibrate"] if job.calibration else []
    if flags:
        raise options.usage(ctx, f"--to original undoes a conversion, which {' and '.join(flags)} cannot change")


def _convert(ctx: typer.Context, wanted: SourceRequest, job: Job, out: Output) -> Result:
    _check_names(job)
    origin = locate(ctx, wanted)
    target = _target(ctx, job, origin, wanted, job.to or "mixed")
    model, origin = open_network(origin, wanted, out, values=not job.dry_run)
    if origin.file is not None:
        model = original_of(model, origin, _ways_on(origin))
    out.step("planning")
    from ...conversion.convert import convert as convert_model
    from ...conversion.undo_record import Undo
    from ...planning.planner import plan

    inputs = example_inputs(model, job.shapes)
    with with_commands(ctx):
        made = plan(model, job.to, rules=job.rules, example_inputs=inputs, **job.planning)
    origin, estimated = mend_statistics(model, made, origin, job.calibration, out, dry_run=job.dry_run)
    if job.dry_run:
        return Result(origin, made, target, written=False)
    if (wish := job.calibration) is not None and wish.budget is not None:
        made = with_groups(model, made, origin, wish, out)
    out.step("converting and checking" if job.check else "converting")
    undo = job.undo or wish is not None  # calibrating needs to know the original
    model = convert_model(model, using=made, example_inputs=inputs, inplace=True, check=job.check, undo=undo)
    record = _record(model)
    report = trial = None
    if wish is not None:
        report = run_calibration(model, None, origin, wish, out)
        if not job.undo:
            record.undo = Undo(complete=False)
        if estimated:  # of course they fit the statistics that they have just given
            report = replace(report, distance=None)
    elif job.trial:
        trial = tried(model, origin, out)
    record.source = None if origin.source is None else origin.source.to_dict()
    from ...checkpoint.saving import save

    out.step(f"writing {target}")
    save(model, target, overwrite=job.force)
    ctx.meta[WRITTEN] = target
    return Result(
        origin, made, target, True, check=record.check, calibration=report, trial=trial, undo=record.undo.complete
    )


def _revert(ctx: typer.Context, wanted: SourceRequest, job: Job, out: Output) -> Result:
    hint = "Give the converted file: normswap convert FILE --to original"
    check_converted(wanted.text, "--to original undoes a conversion, and ", hint)
    origin = locate(ctx, wanted)
    target = _target(ctx, job, origin, wanted, ORIGINAL)
    model, origin = open_network(origin, wanted, out)
    out.step("undoing the conversion")
    from ...checkpoint.saving import save_state

    plan = _record(model).plan
    ways = _ways_back(model, origin)
    model = original_of(model, origin, ways, approximate=job.approximate)
    if not job.dry_run:
        out.step(f"writing {target}")
        save_state(model, target, overwrite=job.force)
        ctx.meta[WRITTEN] = target
    written = not job.dry_run
    return Result(origin, plan, target, written, undone=True, approximate=job.approximate)


def _record(model: nn.Module) -> Record:
    from ...conversion.record import record_of

    record = record_of(model)
    if record is None:
        raise TypeError("a converted network has lost its record")
    return record


def _ways_on(origin: ResolvedSource) -> str:
    """What to do about a file that is to be converted again, and whose conversion cannot be undone."""
    ways = []
    if origin.source is not None:
        again = command(["convert", *building(origin.source, origin.made_with)])
        ways.append(f"Convert what it was made from in its place: {again} ...")
    ways.append(f'In Python, normswap.convert(normswap.load("{origin.file}"), ...) goes on from the network as it is.')
    return "\n".join(ways)


def _ways_back(model: nn.Module, origin: ResolvedSource) -> str:
    """What to do about a file whose conversion cannot be undone exactly."""
    if _record(model).undo.complete:
        return "--approximate undoes the swap with the weights as they are now, which is not the original network."
    if origin.source is None:
        return "Build the original again."
    return "Build the original again: " + " ".join(building(origin.source, origin.made_with))


def _check_names(job: Job) -> None:
    """Tell an unknown norm or role before a network is built."""
    from ...norms.registry import norm_named
    from ...planning.rules import rules_of

    rules_of(job.to, job.rules)
    for name in job.planning["sources"] or ():
        norm_named(name)


def _target(ctx: typer.Context, job: Job, origin: ResolvedSource, wanted: SourceRequest, suffix: str) -> Path:
    """Where the result goes: known to be writable before any work is done, and ours until the command ends."""
    from ...files.writing import check_name, reserved

    target = job.output or Path(f"{origin.stem}-{suffix}.safetensors")
    if job.dry_run:
        check_name(target)
    else:
        ctx.with_resource(reserved(target, overwrite=job.force, inputs=files_read((origin, wanted))))
    return target
