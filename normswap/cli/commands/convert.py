"""`normswap convert`: the main job. Build, plan, convert, prove, save."""

from __future__ import annotations

from typing import Annotated

import typer

from ...choices import NORMS, TRANSFERS
from ..arguments import options
from ..arguments.inputs import given_inputs
from ..arguments.networks import SourceRequest
from ..arguments.preprocessing import PreprocessOverrides
from ..terminal.output import reporting
from ._conversion_job import ORIGINAL, Job, carried_out
from ._convert_report import show
from .calibrate import BUDGET, Calibration


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
    fold_affine: Annotated[
        bool,
        typer.Option(
            "--fold-affine", help="γ and β of ln and rms go into the linear layers that read them; none are left."
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
            min=0,
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
    max_shard_size: options.MaxShardSize = None,
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
    normswap convert vit_b_16 --to rms --fold-affine
    normswap convert nets.py:build_gn --to fused --calibrate photos/
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
        "fold_affine": fold_affine,
        "missing_statistics": "error" if place is None or options.stands_in(place) else "later",
    }
    job = Job(
        to,
        options.rules(ctx, rule),
        planning,
        given_inputs(ctx, input_shape),
        check=not no_check,
        undo=not no_undo,
        approximate=approximate,
        dry_run=dry_run,
        output=output,
        shard_size=options.shard_size(ctx, max_shard_size),
        force=force,
        calibration=_calibration(ctx, place),
        trial=calibrate is None,
    )
    _check_combination(ctx, job)
    wanted = SourceRequest.of(ctx, source)
    with reporting(ctx) as out:
        out.step("loading PyTorch")
        result = carried_out(ctx, wanted, job, out)
        out.show(result.to_dict, lambda page: show(page, result))


def _calibration(ctx: typer.Context, place: str | None) -> Calibration | None:
    """How it is to be repaired, from which images; None without any. Options that need images are refused then."""
    given = ctx.params
    if place is None:
        needing = ("calibrate_images", "method", "budget", "size", "mean", "std")
        options.check_alone(ctx, needing, "--calibrate FOLDER, photos or synthetic")
    groups, budget = given["groups"], given["budget"]
    if budget is not None and (groups not in (None, "auto") or given["channels_per_group"] is not None):
        raise options.usage(ctx, "--budget chooses the number of groups; it goes with --groups auto")
    if place is None:
        return None
    return Calibration(
        place,
        given["calibrate_images"],
        PreprocessOverrides.of(ctx),
        given["method"],
        device=given["device"],
        max_bad=given["max_bad"],
        budget=budget or BUDGET if groups == "auto" or budget is not None else None,
        seed=given["seed"],
    )


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
