"""What `normswap finetune` starts from: a network, converted and calibrated first if --to or --rule ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ...errors import CheckpointError, OptionError, SourceError, WeightsError, plural
from ..arguments.networks import ResolvedSource, SourceRequest, named_after, open_network
from ..arguments.options import stands_in
from ..arguments.preprocessing import Preparation, PreprocessOverrides, prepare
from ..terminal.output import Output
from ..terminal.suggestions import building, with_commands
from ._estimate_statistics import estimated
from .calibrate import Calibration, estimate
from .calibrate import run as run_calibration

if TYPE_CHECKING:
    from torch import nn

    from ...finetuning.tasks.base import Task


@dataclass(frozen=True)
class ConversionRequest:
    """What --to and the options that go with it ask for.

    calibrate: on at most so many images, as asked for or else `usual`, of `place`, a folder or a word for what stands
    in for one, or else of those to train on.
    """

    to: str | None
    rules: list[tuple[str, str]]
    planning: dict[str, Any]
    images: int | None
    usual: int
    calibrate: bool = True
    place: str | None = None

    @property
    def most(self) -> int:
        """How many images to calibrate on at most."""
        return self.images or self.usual

    @property
    def folder(self) -> Path | None:
        """The images to calibrate on, where they are others than those to train on."""
        return None if self.place is None or stands_in(self.place) else Path(self.place)

    def calibration(self, asked: PreprocessOverrides, device: str) -> Calibration | None:
        """What to calibrate on; None for the images to train on."""
        if self.place is None:
            return None
        images = self.images if stands_in(self.place) else self.most
        return Calibration(self.place, images, asked, device=device, counted=self.images is not None)

    def described(self, origin: ResolvedSource, asked: PreprocessOverrides) -> dict[str, Any]:
        """JSON values."""
        source = None if origin.source is None else origin.source.to_dict()
        images = {"calibrate": self.most if self.calibrate else 0, "calibrate_on": self.place and str(Path(self.place))}
        swap = {"to": self.to, "rules": self.rules, **self.planning, **images}
        return {"source": source, "file": None if origin.file is None else str(origin.file), **swap, **asked.given()}

    def check(self) -> None:
        """Tell an unknown norm or role before a network is built."""
        from ...planning.rules import rules_of

        if self.wanted:
            rules_of(self.to, self.rules)

    @property
    def wanted(self) -> bool:
        """Whether the network is to be converted."""
        return self.to is not None or bool(self.rules)


def transform_of(task: Task, preparation: Preparation) -> Any:
    """Detectors prepare their images themselves."""
    return None if task.name == "detection" else preparation.transform


def stem_of(origin: ResolvedSource, swap: ConversionRequest) -> str:
    """What the folder of the run is called, if the user does not say."""
    if swap.wanted:
        return f"{origin.stem}-{swap.to or 'mixed'}"
    return named_after(origin.file).name if origin.file else origin.stem


def network_of(
    wanted: SourceRequest,
    origin: ResolvedSource,
    swap: ConversionRequest,
    asked: PreprocessOverrides,
    out: Output,
    resumed: Path | None,
) -> tuple[nn.Module, ResolvedSource, Preparation]:
    """The network to train, not converted yet; that of the run to go on with, where there is one."""
    if resumed is not None:
        from ...finetuning.output.layout import LAST

        if not (resumed / LAST).exists():
            raise CheckpointError(
                f"there is no {resumed / LAST} to go on with", hint="Leave --resume out to begin anew."
            )
        if origin.file is None:  # the command names the code itself, and `keep_command` has seen that it is the same
            wanted = replace(wanted, trust_code=True)
        model, origin = _resumed(origin, wanted, resumed / LAST, out)
        return model, origin, prepare(model, origin, asked)
    if origin.file is not None and swap.wanted:
        raise OptionError(
            f"{origin.file} is converted already",
            hint=f"Leave --to out, or convert its source: {' '.join(building(origin.source, origin.made_with))}",
        )
    if origin.file is not None and (swap.place is not None or swap.images is not None):
        raise OptionError(
            f"{origin.file} is converted already; --calibrate goes with --to, which calibrates what it converts",
            hint=f"Calibrate the file first: normswap calibrate {origin.file} --data {swap.place or 'FOLDER'}",
        )
    model, origin = open_network(origin, wanted, out)
    if origin.file is not None and _as_converted(model):
        out.note(
            f"{origin.file} is as it was converted; on images like those of its pretraining it trains better after "
            f"`normswap calibrate {origin.file} --data FOLDER`"
        )
    return model, origin, prepare(model, origin, asked)


def _resumed(
    origin: ResolvedSource, wanted: SourceRequest, file: Path, out: Output
) -> tuple[nn.Module, ResolvedSource]:
    """The network of a run's file. Its code may lie beside the file that the run began with, and not beside this.

    Or elsewhere: what the command names then builds it. Raises WeightsError where that is another network.
    """
    from ...checkpoint.manifest import read_manifest
    from ...sources.spec import Source
    from ...sources.user_code import beside

    source, held = origin.source, read_manifest(file)["source"]
    if origin.file is None and source is not None and source.runs_code and Source.from_dict(held) != source:
        wanted = replace(wanted, source=str(source))
    if wanted.source is not None and source is not None and held is not None:
        source = replace(source, weights=held.get("weights"))
        origin = replace(origin, source=source)
    if origin.file is not None and source is not None and wanted.source is None:
        with suppress(SourceError):  # beside the run's file, then, or not at all
            found = beside(source, origin.file)
            wanted, origin = replace(wanted, source=str(found)), replace(origin, source=found)
    try:
        model, opened = open_network(ResolvedSource(origin.source, file), wanted, out)
    except WeightsError as error:
        if wanted.source is None:
            raise
        raise WeightsError(
            f"{origin.source} builds another network than the run in {file.parent} began with:\n"
            + error.message.partition("\n")[2],
            hint="Give the code that the run began with, wherever it lies now.",
        ) from error
    return model, replace(opened, source=source)  # as it was noted


def _as_converted(model: nn.Module) -> bool:
    """Whether norms that calibration would have repaired are as the conversion has left them."""
    from ...conversion.record import record_of
    from ...norms.registry import norm_named

    record = record_of(model)
    steps = () if record is None or record.history else record.plan.steps
    return any(norm_named(step.target).per_sample for step in steps)


def converted(
    ctx: typer.Context,
    model: nn.Module,
    origin: ResolvedSource,
    swap: ConversionRequest,
    inputs: Iterator[Any],
    asked: PreprocessOverrides,
    out: Output,
    device: str = "auto",
) -> nn.Module:
    """inputs: batches to calibrate on, where no other folder was named."""
    from ...conversion.convert import convert
    from ...conversion.preconditions import affine_moved, never_updated
    from ...conversion.record import record_of
    from ...norms.registry import states_in

    calibrating = swap.wanted and swap.calibrate
    wish = swap.calibration(asked, device)
    states = states_in(model) if calibrating else []
    unknown = never_updated(states) and affine_moved(states)
    training = wish is None or (wish.stands_in and unknown)  # what stands in is made by the statistics
    images = Images(
        list(inputs) if calibrating and training else [],
        wish,
        "training images" if swap.folder is None else f"images of {swap.folder}",
    )
    if unknown:
        origin = _with_statistics(model, origin, images, out)
    calibrating = calibrating and not (swap.images is None and _far(model, images, out))
    out.step("converting" if swap.wanted else "preparing")
    rules = swap.rules if swap.wanted else [("*", "keep")]
    with with_commands(ctx):
        model = convert(model, swap.to, rules=rules, inplace=True, check=swap.wanted, **swap.planning)
    record = record_of(model)
    if record is not None:
        for rule in record.plan.meta["rules"] if swap.wanted else ():
            if rule["pattern"] != "*":
                out.note(f"{rule['pattern']} matched {plural(rule['layers'], 'layer')}: {rule['target']}")
        record.source = None if origin.source is None else origin.source.to_dict()
    if calibrating:
        _calibrate(model, origin, images, out)
    return model


@dataclass(frozen=True)
class Images:
    """What to calibrate on: batches of those to train on, or what `wish` names. told: whose they are."""

    batches: list[Any]
    wish: Calibration | None
    told: str


def _with_statistics(model: nn.Module, origin: ResolvedSource, images: Images, out: Output) -> ResolvedSource:
    """Estimate the running statistics, which were never updated. The origin says so."""
    from ...calibration.calibrate import estimate_statistics

    if images.wish is None or images.wish.stands_in:
        report = estimate_statistics(model, images.batches, progress=False)
    else:
        report = estimate(model, origin, images.wish, out)
    out.note(f"the running statistics were never updated: estimated on {report.images} {images.told}")
    return estimated(origin, model)


def _far(model: nn.Module, images: Images, out: Output) -> bool:
    """Whether the images to train on are not what the network was trained on, so that its outputs there are no aim."""
    from ...calibration.fit import fit_of_some

    found = None if images.wish is not None else fit_of_some(model, images.batches)
    if found is None or not found.far:
        return False
    out.note(
        f"not calibrated: the training images are {found.verdict} (distance {found.distance:.2g} from the running "
        "statistics), and a network that is fitted to what it makes of them trains worse; --calibrate-images N does it"
    )
    return True


def _calibrate(model: nn.Module, origin: ResolvedSource, images: Images, out: Output) -> None:
    from ...calibration.calibrate import calibrate

    out.step("calibrating")
    if images.wish is None:
        report = calibrate(model, None, images.batches, progress=False)
    else:
        report = run_calibration(model, None, origin, images.wish, out)
    if report.layers:
        note = f"calibrated on {report.stand_ins or f'{report.images} {images.told}'}"
        before, after = report.drift_before, report.drift_after
        if before is not None and after is not None:  # outputs of detectors differ in number, so there is none
            note += f": relative error of the output {before:.3g}, after {after:.3g}"
        out.note(note)
