"""`normswap advise`: which norm suits a network and its task, with the reason, the risks and the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...choices import PURPOSES
from ..arguments import options
from ..arguments.datasets import images_in
from ..arguments.inputs import example_inputs, given_inputs
from ..arguments.networks import ResolvedSource, SourceRequest, locate, on_device, open_network
from ..arguments.preprocessing import PreprocessOverrides, prepare
from ..terminal import flags
from ..terminal.output import reporting
from ..terminal.suggestions import command

if TYPE_CHECKING:
    from ...advice.report import Advice
    from ..terminal.render import Page


def advise(
    ctx: typer.Context,
    source: options.Source,
    task: Annotated[str, options.word(PURPOSES, "What the network is to do.")] = "classification",
    batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Images a GPU in training.", show_default="2")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Images, without labels: are they what it was trained on?", show_default=False
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="It is trained with per-sample gradients, as for differential privacy.")
    ] = False,
    federated: Annotated[bool, typer.Option("--federated", help="It is trained by several clients.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="Its weights are averaged.")] = False,
    inference: Annotated[bool, typer.Option("--inference", help="It is not trained any more.")] = False,
    size: options.Size = None,
    mean: options.Mean = None,
    std: options.Std = None,
    max_bad: options.MaxBad = 10,
    weights: options.Weights = None,
    arg: options.Arg = None,
    input_shape: options.Input = None,
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
    """Recommend a norm, groups and transfer, with the reason, the risks in this network, and the command to paste.

    Without --data the command repairs the swap on photographs that come with normswap, if they fit. --data tells
    whether the images are like what the network was trained on, and the command repairs on them. --input gives the
    size of inputs that the expected drift is for.

    \b
    normswap advise resnet50 --batch-size 2
    normswap advise resnet50 --task detection --data photos/
    normswap advise nets.py:policy --ema
    """
    asked = PreprocessOverrides.of(ctx)
    given = given_inputs(ctx, input_shape)
    if data is None:
        if size is not None and not input_shape:
            raise options.usage(ctx, _size_alone(asked.size))
        options.check_alone(ctx, ("size", "mean", "std"), "--data FOLDER")
    wanted = SourceRequest.of(ctx, source)
    situation: dict[str, Any] = {
        "task": task, "batch_size": batch_size, "private": private, "federated": federated, "ema": ema,
        "inference": inference,
    }  # fmt: skip
    with reporting(ctx) as out:
        out.step("loading PyTorch")
        from ...advice.advise import IMAGES
        from ...advice.advise import advise as advice_on
        from ...advice.rules import Situation

        Situation(**situation)  # before a network is built
        folder = None if data is None else images_in(data, out, limit=IMAGES, train=True)
        model, origin = open_network(locate(ctx, wanted), wanted, out)
        read: Any = None
        if folder is not None:
            preparation = prepare(model, origin, asked)
            read = folder.batches(preparation.transform, 16, stack=preparation.stack, max_bad=max_bad)
        out.step("looking at the network")
        with on_device(device, model):
            advice = advice_on(model, **situation, data=read, example_inputs=example_inputs(model, given))
        if not options.stands_in(advice.stand_in):  # a folder of that name goes before
            advice = replace(advice, stand_in="")
        words = command_of(advice, wanted, data, asked, input_shape or ())
        out.show(
            lambda: {"network": origin.to_dict(), **advice.to_dict(), "command": command(words) if words else None},
            lambda page: _render(page, origin, advice, words, () if read is None else tuple(read.bad)),
        )


def _size_alone(size: Any) -> str:
    """Without images there is nothing to resize: what the user means is the size that the drift is for."""
    shape = ",".join(map(str, size)) if isinstance(size, tuple) else "H,W"
    return f"--size goes with --data: add --data FOLDER, or say --input 1,3,{shape} for the drift at that size"


def command_of(
    advice: Advice, wanted: SourceRequest, data: Path | None, asked: PreprocessOverrides, inputs: Sequence[str]
) -> list[str]:
    """The words of the command line that does it; none where there is nothing to do. inputs: values of --input."""
    if not advice.options:
        return []
    words = ["convert", *wanted.words(), *(word for fix in advice.fixes for word in flags.words(fix))]
    words += [word for text in inputs for word in ("--input", text)]
    if advice.calibrate:
        words += ["--calibrate", str(data), *asked.words()]
    elif advice.stand_in:
        size = [] if advice.guessed else ["--size", ",".join(map(str, advice.inputs[0][-2:]))]
        words += ["--calibrate", advice.stand_in, *size]
    return words


def _render(page: Page, origin: ResolvedSource, advice: Advice, words: list[str], bad: tuple[str, ...]) -> None:
    page.line((origin.told, "strong"))
    page.facts(*((label, flags.told(text)) for label, text in advice.facts), indent=0)
    for risk in advice.risks:
        page.line(("risk: ", "bad"), str(risk))
    page.skipped(bad)
    if advice.problem:
        page.line(flags.told(advice.problem))
    if words:
        page.line(("Next: ", "strong"), command(words))
