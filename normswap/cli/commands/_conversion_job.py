"""What `normswap convert` does once it knows what was asked: build, plan, convert, prove, calibrate, save; or undo."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ...errors import NetworkError
from ..arguments.inputs import GivenInput, example_inputs, may_take_images
from ..arguments.networks import (
    ResolvedSource,
    SourceRequest,
    check_converted,
    files_read,
    locate,
    open_network,
    original_of,
)
from ..terminal.errors import WRITTEN
from ..terminal.output import Output
from ..terminal.suggestions import building, command, with_commands
from ._calibration_trial import tried
from ._convert_report import Result
from ._estimate_statistics import mend_statistics
from .calibrate import Calibration, with_groups
from .calibrate import run as run_calibration

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...calibration.report import CalibrationReport
    from ...conversion.record import Record
    from ...planning.plan import Plan

ORIGINAL = "original"


@dataclass(frozen=True)
class Job:
    """What was asked of the conversion itself. planning: arguments of `normswap.plan`.

    shard_size: the most bytes of each file of a folder; None for one file.
    trial: whether to try what calibration would gain, where none is asked for.
    """

    to: str | None
    rules: list[tuple[str, str]]
    planning: dict[str, Any]
    inputs: list[GivenInput]
    check: bool
    undo: bool
    approximate: bool
    dry_run: bool
    output: Path | None
    shard_size: int | None
    force: bool
    calibration: Calibration | None
    trial: bool


def carried_out(ctx: typer.Context, wanted: SourceRequest, job: Job, out: Output) -> Result:
    """Convert, or undo a conversion, and write the result."""
    return (_undone if job.to == ORIGINAL else _converted)(ctx, wanted, job, out)


def _converted(ctx: typer.Context, wanted: SourceRequest, job: Job, out: Output) -> Result:
    _check_names(job)
    origin = locate(ctx, wanted)
    target = _target(ctx, job, origin, wanted, job.to or "mixed")
    if _is_large(job, origin):
        from ...files.spilling import Spilling

        ctx.with_resource(Spilling(target.absolute().parent))
    model, origin = open_network(origin, wanted, out, values=not job.dry_run)
    model, onward = _start_of(model, origin, job, out)
    from ...conversion.convert import convert as convert_model

    inputs = example_inputs(model, job.inputs)
    made = _planned(ctx, model, job, inputs, out)
    origin, estimated = mend_statistics(model, made, origin, job.calibration, out, dry_run=job.dry_run)
    if job.dry_run:
        return Result(origin, made, target, written=False)
    if (wish := job.calibration) is not None and wish.budget is not None:
        made = with_groups(model, made, origin, wish, out, inputs)
    out.step("converting and checking" if job.check else "converting")
    undo = job.undo or wish is not None  # calibrating needs to know the original
    model = convert_model(model, using=made, example_inputs=inputs, inplace=True, check=job.check, undo=undo)
    report = None if wish is None else _calibrated(model, origin, job, wish, inputs, out)
    if report is not None and estimated:  # of course they fit the statistics that they have just given
        report = replace(report, distance=None)
    trial = tried(model, origin, out) if wish is None and job.trial and not _is_large(job, origin) else None
    if onward:
        _as_one(model, origin)
    _record(model).source = None if origin.source is None else origin.source.to_dict()
    images = trial is None or trial.drift is not None or may_take_images(model, job.inputs)
    words = _unremembered(ctx, job)
    result = Result(
        origin, made, target, True, calibration=report, trial=trial, inputs=words, onward=onward, images=images
    )
    return _written(ctx, model, result, job, out)


def _start_of(model: nn.Module, origin: ResolvedSource, job: Job, out: Output) -> tuple[nn.Module, bool]:
    """The network to convert, and whether that is one that normswap had converted, as it was trained since."""
    if origin.file is None:
        return model, False
    if _goes_on(model, job):
        out.note(
            f"{origin} was trained since its conversion, and is fused as it is now; the result cannot be undone, and "
            f"{origin} alone is the network before"
        )
        return model, True
    calibrated = _record(model).calibrated
    model = original_of(model, origin, _ways_on(origin))
    if calibrated:
        again = "; calibrate again" if job.calibration is None else ""
        out.note(f"this starts from the original of {origin}: what calibrating gave is not carried over{again}")
    return model, False


def _planned(ctx: typer.Context, model: nn.Module, job: Job, inputs: tuple[Tensor, ...] | None, out: Output) -> Plan:
    from ...conversion.convert import cautions
    from ...planning.planner import plan

    out.step("planning")
    with with_commands(ctx):
        made = plan(model, job.to, rules=job.rules, example_inputs=inputs, **job.planning)
    for caution in cautions(made):
        out.note(caution)
    return made


def _unremembered(ctx: typer.Context, job: Job) -> tuple[str, ...]:
    """Values of --input that go with the next command: a single one of a shape alone is known from the file."""
    known = len(job.inputs) < 2 and all(each.random for each in job.inputs)
    return () if known else tuple(ctx.params["input_shape"])


def _is_large(job: Job, origin: ResolvedSource) -> bool:
    """Whether to convert file to file, without ever holding the network: shards that become shards, and no images."""
    from ...sources.weights import in_parts

    sharded = job.shard_size is not None and origin.asked is not None and in_parts(origin.asked)
    return sharded and job.calibration is None and not job.dry_run


def _calibrated(
    model: nn.Module, origin: ResolvedSource, job: Job, wish: Calibration, inputs: Any, out: Output
) -> CalibrationReport:
    from ...conversion.undo_record import Undo

    report = run_calibration(model, None, origin, wish, out, inputs)
    if not job.undo:
        _record(model).undo = Undo(complete=False)
    return report


def _written(ctx: typer.Context, model: nn.Module, result: Result, job: Job, out: Output) -> Result:
    """Write the network; the result with what its record says."""
    from ...checkpoint.saving import save
    from ...checkpoint.undo_tensors import undo_size

    out.step(f"writing {result.target}")
    save(model, result.target, overwrite=job.force, max_shard_size=job.shard_size)
    ctx.meta[WRITTEN] = result.target
    record = _record(model)
    return replace(
        result,
        plan=result.plan if result.onward else record.plan,
        check=record.check,
        undo=record.undo.complete,
        undo_bytes=undo_size(record.undo),
    )


def _undone(ctx: typer.Context, wanted: SourceRequest, job: Job, out: Output) -> Result:
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
        save_state(model, target, overwrite=job.force, max_shard_size=job.shard_size)
        ctx.meta[WRITTEN] = target
    written = not job.dry_run
    return Result(origin, plan, target, written, undone=True, approximate=job.approximate)


def _record(model: nn.Module) -> Record:
    from ...conversion.record import record_of

    record = record_of(model)
    if record is None:
        raise TypeError("a converted network has lost its record")
    return record


def _goes_on(model: nn.Module, job: Job) -> bool:
    """Whether a converted network that was trained since is to be fused: on images, from how it is now."""
    from ...norms.registry import norm_named

    wish, trained = job.calibration, any(entry.trains for entry in _record(model).history)
    fuses = job.to is not None and not job.rules and norm_named(job.to).fuses
    return trained and fuses and wish is not None and not wish.stands_in


def _as_one(model: nn.Module, origin: ResolvedSource) -> None:
    from ...conversion.joined import joined

    if not joined(model):
        raise NetworkError(
            f"{origin} cannot be fused as it was trained: not all of its norms take their statistics from each sample",
            hint=f'In Python, normswap.load("{origin.file}") gives the network; convert and calibrate go on from it.',
        )


def _ways_on(origin: ResolvedSource) -> str:
    """What to do about a file that is to be converted again, and whose conversion cannot be undone."""
    ways = []
    if origin.source is not None:
        again = command(["convert", *building(origin.source, origin.made_with)])
        ways.append(f"Convert what it was made from in its place: {again} ...")
    ways.append(f"To fuse it as it was trained: {command(['convert', str(origin.file)])} --to fused --calibrate FOLDER")
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
    from ...files.folders import check_folder_name, reserved_folder
    from ...files.writing import check_name, reserved

    one_file = job.shard_size is None
    target = job.output or Path(f"{origin.stem}-{suffix}{'.safetensors' if one_file else ''}")
    if job.dry_run:
        (check_name if one_file else check_folder_name)(target)
    else:
        place = reserved if one_file else reserved_folder
        ctx.with_resource(place(target, overwrite=job.force, inputs=files_read((origin, wanted))))
    return target
