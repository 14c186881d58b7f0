"""`normswap verify`: how far one network is from another, layer by layer and at the output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import DataError, first_line, plural
from ..arguments import options
from ..arguments.completion import model_names
from ..arguments.datasets import images_in
from ..arguments.inputs import GivenInput, example_inputs, given_inputs, remembered_inputs
from ..arguments.networks import (
    ResolvedSource,
    SourceRequest,
    converted_file,
    locate,
    open_network,
    open_original,
    original_of,
    restored,
)
from ..arguments.preprocessing import Preparation, PreprocessOverrides, prepare
from ..terminal import flags
from ..terminal.errors import BelowLimit
from ..terminal.output import Output, reporting
from ..terminal.suggestions import building, command, repeated

if TYPE_CHECKING:
    from torch import nn

    from ...comparison.verification import VerificationReport
    from ...data.batches import Batches
    from ...data.image_folder import ImageBatches, ImageData
    from ..terminal.render import Page

_WORST = 10
_IMAGES = 8  # of random numbers


def verify(
    ctx: typer.Context,
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="The reference: " + options.SOURCE_HELP, autocompletion=model_names, show_default=False
        ),
    ],
    b: Annotated[
        str | None,
        typer.Argument(
            metavar="B",
            autocompletion=model_names,
            help="The other; without it, A is a converted file and compared with its original.",
        ),
    ] = None,
    data: options.Data = None,
    images: options.Images = None,
    batch_size: options.BatchSize = 64,
    size: options.Size = None,
    mean: options.Mean = None,
    std: options.Std = None,
    max_bad: options.MaxBad = 10,
    weights: options.Weights = None,
    arg: options.Arg = None,
    input_shape: options.Input = None,
    show_all: Annotated[bool, typer.Option("--all", help="Every layer, in order, instead of the worst ten.")] = False,
    fail_below: options.FailBelow = None,
    device: options.Device = "auto",
    built_by: options.BuiltBy = None,
    trust_pickle: options.TrustPickle = False,
    trust_code: options.TrustCode = False,
    allow_nonfinite: options.AllowNonfinite = False,
    seed: options.Seed = 0,
    force: options.Force = False,
    report: options.Report = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure how far B's outputs are from A's: for each layer, at the output, and in accuracy on labelled images.

    Without --data the inputs are random, which shows gross errors but says little about accuracy. --weights and --arg
    are those of A. --fail-below is about the agreement: the share of images (pixels, boxes) decided alike.

    \b
    normswap verify resnet50-gn.safetensors
    normswap verify resnet50 resnet50-gn.safetensors --data photos/
    """
    asked = PreprocessOverrides.of(ctx)
    given = given_inputs(ctx, input_shape)
    if data is None:
        options.check_alone(ctx, ("images", "size", "mean", "std"), "--data FOLDER")
    if data is not None and given:
        raise options.usage(ctx, "--input and --data exclude each other")
    wanted = SourceRequest.of(ctx, a)
    with reporting(ctx) as out:
        out.step("loading PyTorch")
        from ...comparison import verification

        folder = None if data is None else images_in(data, out, limit=images, train=False)
        first, second, origins = _pair(ctx, wanted, b, out)
        preparation = prepare(first, origins[0], asked).settled(() if folder is None else folder.files)
        read = None
        if folder is not None:
            read = folder.batches(preparation.transform, batch_size, stack=preparation.stack, max_bad=max_bad)
        batches = _batches((first, second), read, given, out)
        if folder is None:
            out.step("comparing")
        with _inputs_asked_for((first, second), batches, given):
            found = verification.verify(first, second, batches, device=device)
        notes = (*found.notes, *_untrained(first))
        found = replace(found, random_inputs=folder is None, notes=notes, bad=() if read is None else tuple(read.bad))
        used = preparation if folder is not None else None
        out.show(
            lambda: _values(found, origins, used, data),
            lambda page: _render(
                page, found, origins, _description(folder, used), show_all, fail_below is not None, _ways_on(ctx, given)
            ),
        )
        _check_agreement(found, fail_below)


@contextmanager
def _inputs_asked_for(
    pair: tuple[nn.Module, nn.Module], batches: Batches | None, given: list[GivenInput]
) -> Iterator[None]:
    """Where none are given and none can be guessed, the error names the option for others than images, too.

    Where some are given and a network does not run on them, it names what forward takes.
    """
    from ...inspection.example_inputs import guess_inputs, runs

    try:
        yield
    except DataError as error:
        model = next((each for each in pair if given and not runs(each, example_inputs(each, given) or ())), None)
        if model is not None and error.__cause__ is not None:
            raise _not_run(model, given, error.__cause__) from error
        model = pair[0]
        if batches is not None or guess_inputs(model) is not None:
            raise
        way = "--data FOLDER gives images, --input other inputs, such as --input 4,40,100 --input 4=100,80,60,50."
        raise DataError(error.message, hint=way) from error


def _not_run(model: nn.Module, given: list[GivenInput], cause: BaseException) -> DataError:
    from ...data.one_batch import Forward

    network = Forward.of(model)
    names = ", ".join(str(parameter) for parameter in network.parameters)
    said = "the input" if len(given) == 1 else f"the {len(given)} inputs"
    return DataError(
        f"{network.name} does not run on {said} given by --input ({type(cause).__name__}: {first_line(cause)})",
        hint=f"Give --input once for each argument of {network.name}.forward({names}), in that order, of the shape "
        "that it takes.",
    )


def _check_agreement(report: VerificationReport, limit: float | None) -> None:
    """Raise what --fail-below is for."""
    if limit is None:
        return
    from ...comparison.verification import ALL_ZERO

    if ALL_ZERO in report.notes:
        raise DataError(f"--fail-below cannot tell: {ALL_ZERO}")
    if report.agreement is None:
        raise DataError(
            "--fail-below is about the share of decisions that agree, and these outputs hold none",
            hint="Without class scores or boxes there is the relative error, which --json gives.",
        )
    if report.agreement < limit:
        raise BelowLimit("agreement", report.agreement, limit)


def _pair(
    ctx: typer.Context, wanted: SourceRequest, b: str | None, out: Output
) -> tuple[nn.Module, nn.Module, tuple[ResolvedSource, ResolvedSource]]:
    """The two networks. With one file of ours, the first is what it was made from."""
    from ...sources.resolve import missing_file

    if b is None:
        if converted_file(wanted.text) is None:
            if (missing := missing_file(wanted.text)) is not None:
                raise missing
            raise options.usage(ctx, f"give a second network, or a file that normswap wrote; {wanted.text} is none")
        origin = locate(ctx, wanted)
        original, *with_weights = building(origin.source, origin.made_with)
        trust = ["--trust-code"] if wanted.trust_code else []
        instead = "Give the original as well: " + command(["verify", original, wanted.text, *with_weights, *trust])
        first = original_of(open_network(origin, wanted, out)[0], origin, instead)
        second, _ = open_network(origin, wanted, out, warn=False)
        return first, second, (restored(origin), origin)
    other = replace(wanted, text=b, weights=None, args=())
    if wanted.source is not None and (files := [converted_file(one.text) for one in (wanted, other)]) != [None, None]:
        wanted, other = (
            replace(one, source=wanted.source if file else None)
            for one, file in zip((wanted, other), files, strict=True)
        )
    places = locate(ctx, wanted), locate(ctx, other)
    first, origin_a = open_original(ctx, wanted, places[1], other, out)
    second, origin_b = open_original(ctx, other, places[0], wanted, out)
    return first, second, (origin_a, origin_b)


def _batches(
    pair: tuple[nn.Module, nn.Module], read: ImageBatches | None, given: list[GivenInput], out: Output
) -> Batches | None:
    """Images, inputs that were given or are remembered, or None for inputs that verify finds itself."""
    from ...data.batches import Batches

    if read is None:
        remembered = (remembered_inputs(model, _IMAGES) for model in reversed(pair))
        inputs = example_inputs(pair[0], given) or next(filter(None, remembered), None)
        return None if inputs is None else Batches((inputs[0] if len(inputs) == 1 else (inputs, None),))
    return Batches(out.track(read, len(read), "comparing batches"), read.classes)


def _untrained(model: nn.Module) -> list[str]:
    """Statistics of no data, as random weights have them, are what no norm that measures its input can agree with."""
    import torch

    from ...inspection.inventory import inspect

    states = [layer.state for layer in inspect(model, feeds=False).layers if layer.state.has_statistics]
    var = [state.running_var for state in states if state.running_var is not None]
    mean = [state.running_mean for state in states if state.running_mean is not None]
    if not var or not bool(torch.all(torch.cat(var) == 1)) or bool(torch.any(torch.cat(mean))):
        return []
    return [
        "the running statistics of A were never updated (mean 0, variance 1), so a norm that takes its statistics "
        "from the input has to differ from it; a trained network tells more"
    ]


def _description(folder: ImageData | None, preparation: Preparation | None) -> str:
    if folder is None:
        return "random inputs, which say little about accuracy; --data FOLDER compares on images"
    return f"{folder}; {preparation}"


def _values(
    report: VerificationReport,
    origins: tuple[ResolvedSource, ResolvedSource],
    preparation: Preparation | None,
    data: Path | None,
) -> dict[str, Any]:
    return {
        "a": origins[0].to_dict(),
        "b": origins[1].to_dict(),
        "data": None if data is None else str(data),
        "preprocess": None if preparation is None else preparation.to_dict(),
        **report.to_dict(),
    }


def _ways_on(ctx: typer.Context, given: list[GivenInput]) -> str:
    """What gives a verdict that counts, where the inputs are random: images, if these were made like such."""
    if given and (len(given) > 1 or not given[0].like_images):
        return "normswap.verify(a, b, data) in Python takes data of your own"
    return repeated(ctx, drop=("--input",), add=("--data", "FOLDER"))


def _render(
    page: Page,
    report: VerificationReport,
    origins: tuple[ResolvedSource, ResolvedSource],
    inputs: str,
    show_all: bool,
    limited: bool,
    ways_on: str,
) -> None:
    page.facts(
        ("A", origins[0].told),
        ("B", origins[1].told),
        ("inputs", f"{report.images} {inputs}" if report.random_inputs else inputs),
        indent=0,
    )
    _layers(page, report, show_all)
    page.gap()
    page.facts(*_figures(report, limited), indent=0)
    for note in report.notes:
        page.line(("note: ", "dim"), flags.told(note))
    page.skipped(report.bad)
    if report.verdict:
        page.gap()
        page.line(("Verdict: ", "strong"), f"{report.verdict}.")
        page.line("A verdict that counts: ", ways_on)


def _layers(page: Page, report: VerificationReport, show_all: bool) -> None:
    if not report.layers:
        return
    rows = list(report.layers)
    if not show_all:
        rows = sorted(rows, key=lambda layer: -layer.error)[:_WORST]
    hidden = len(report.layers) - len(rows)
    page.gap()
    page.table(
        ("layer" if show_all else "worst layers", ">relative error", ">largest difference"),
        (((x.path, "path"), f"{x.error:.3g}", f"{x.max_abs:.3g}") for x in rows),
    )
    if hidden:
        page.line((f"{plural(hidden, 'layer')} more; --all shows every layer in order", "dim"))


def _figures(report: VerificationReport, limited: bool) -> list[tuple[str, str]]:
    """limited: whether the agreement is what --fail-below judges, so that it is shown whatever the inputs are."""
    figures = []
    jump = next((layer for layer in report.layers if layer.path == report.first_jump), None)
    if report.layers:
        where = "none" if jump is None else f"{jump.path}, relative error {jump.error:.3g}"
        figures.append(("first jump", where))
    if report.error is not None and report.max_abs is not None:
        what = "drift" if report.random_inputs else "output"
        figures.append((what, f"relative error {report.error:.3g}, largest difference {report.max_abs:.3g}"))
    if report.random_inputs and report.agreement is not None and not limited:
        return [*figures, ("agreement", "random inputs are of no class, and say nothing about it; --data FOLDER does")]
    if report.agreement is not None:
        figures.append(("agreement" if report.error is not None else "boxes agree", f"{report.agreement:.4f}"))
    if report.kl is not None:
        figures.append(("KL(A, B)", f"{report.kl:.3g} nats"))
    if report.labelled:
        figures.append(
            (
                "accuracy",
                f"A {report.accuracy_a:.4f}, B {report.accuracy_b:.4f} on {plural(report.labelled, 'labelled image')}",
            )
        )
    return figures
