"""`normswap export`: a network as a file for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...choices import EXPORTS
from ..arguments import options
from ..arguments.inputs import example_inputs, given_inputs, remembered_inputs
from ..arguments.networks import (
    ResolvedSource,
    SourceRequest,
    files_read,
    locate,
    named_after,
    open_network,
)
from ..arguments.preprocessing import PreprocessOverrides, known_inputs
from ..terminal import flags
from ..terminal.errors import WRITTEN
from ..terminal.output import reporting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...exporting.report import ExportReport
    from ..terminal.render import Page

_SUFFIX = {"onnx": ".onnx", "torchscript": ".pt", "exported": ".pt2"}


def export(
    ctx: typer.Context,
    source: options.Source,
    kind: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="|".join(EXPORTS),
            help="What the file is to be.",
            autocompletion=options.completing(*EXPORTS),
            show_default=False,
        ),
    ],
    output: options.Output = None,
    force: options.Force = False,
    opset: Annotated[
        int | None,
        typer.Option(min=18, metavar="N", help="Opset of ONNX; GroupNormalization takes 21.", show_default="21"),
    ] = None,
    input_shape: options.Input = None,
    weights: options.Weights = None,
    arg: options.Arg = None,
    built_by: options.BuiltBy = None,
    trust_pickle: options.TrustPickle = False,
    trust_code: options.TrustCode = False,
    allow_nonfinite: options.AllowNonfinite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a network as ONNX, TorchScript or a torch.export program, and compare the file's outputs with its own.

    The size of the inputs is that of --input, or that which the file or the weights were trained with, where that is
    known; the batch may be of any size. A file whose outputs differ is not written.

    \b
    normswap export resnet50-gn.safetensors --to onnx
    normswap export nets.py:build --weights mine.pth --input 1,3,512,512 --to exported
    """
    options.choice(ctx, "--to", kind, EXPORTS)
    given = given_inputs(ctx, input_shape)
    wanted = SourceRequest.of(ctx, source)
    words: Any = {"to": kind}
    with reporting(ctx) as out:
        out.step("loading PyTorch")
        from ...exporting.export import export as write
        from ...files.writing import check_writable

        origin = locate(ctx, wanted)
        stem = named_after(origin.file).name if origin.file is not None else origin.stem
        target = output or Path(f"{stem}{_SUFFIX[kind]}")
        check_writable(target, overwrite=force, inputs=files_read((origin, wanted)))
        model, origin = open_network(origin, wanted, out)
        inputs = example_inputs(model, given) or remembered_inputs(model) or _trained_with(model, origin)
        if inputs is None:
            out.note("the size of the inputs is a guess; --input N,C,H,W says it")
        out.step(f"exporting to {kind}")
        found = write(model, target, **words, example_inputs=inputs, opset=opset, overwrite=force)
        ctx.meta[WRITTEN] = target
        out.show(
            lambda: {"network": origin.to_dict(), **found.to_dict()},
            lambda page: _page(page, found, origin),
        )


def _trained_with(model: nn.Module, origin: ResolvedSource) -> tuple[Tensor, ...] | None:
    """An input of the size that the weights say; None where they do not."""
    from ...inspection.example_inputs import random_tensor

    known = known_inputs(model, origin, PreprocessOverrides())
    return (random_tensor((1, *known["shape"]), model),) if "shape" in known else None


def _page(page: Page, found: ExportReport, origin: ResolvedSource) -> None:
    from ..terminal.render import size

    norms = ", ".join(f"{count} {name}" for name, count in found.operators.items())
    page.facts(
        ("network", origin.told),
        ("inputs", found.inputs),
        *([("operators", f"opset {found.opset}" + f", {norms}" * bool(norms))] if found.opset is not None else []),
        ("outputs", f"relative error {found.error:.2g}, on batches of {' and '.join(map(str, found.batches))}"),
        indent=0,
    )
    for note in found.notes:
        page.line(("note: ", "dim"), flags.told(note))
    page.line(("Written: ", "strong"), (str(found.path), "path"), f", {size(found.path.stat().st_size)}")
