"""`normswap card`: a converted file as a folder for the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..arguments import options
from ..arguments.networks import check_converted
from ..terminal.errors import WRITTEN
from ..terminal.output import reporting
from ..terminal.suggestions import command

if TYPE_CHECKING:
    from ...pages.model_card import HubFolder
    from ..terminal.render import Page


def card(
    ctx: typer.Context,
    file: options.Converted,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.", show_default="<FILE>-hub"),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The license's name on the hub, such as apache-2.0.", show_default=False),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Figures to show, as evaluate -o wrote them.", show_default=False),
    ] = None,
    force: options.Force = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="As other commands take it; nothing is run for a card.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a folder that `hf upload` takes: the file, a model card with what changed, and a script that loads it.

    The card's front matter names library, base model and task where they are known; the license is yours to say.
    Code of your own that builds the network is copied too: look at what you publish.

    \b
    normswap card resnet50-gn.safetensors --license apache-2.0
    hf upload USER/resnet50-gn resnet50-gn-hub
    """
    with reporting(ctx) as out:
        check_converted(file, "", f"Convert the network first: normswap convert {file} --to gn")
        out.step("writing the card")
        from ...pages.licenses import unknown_license
        from ...pages.model_card import Evaluation, write_hub_folder

        if (unknown := unknown_license(license)) is not None:
            out.note(unknown)
        path = Path(file)
        folder = output or path.with_name(f"{path.stem}-hub")
        figures = None if evaluation is None else Evaluation.read(evaluation)
        found = write_hub_folder(path, folder, license=license, evaluation=figures, overwrite=force)
        ctx.meta[WRITTEN] = folder
        out.show(found.to_dict, lambda page: _page(page, found))


def _page(page: Page, found: HubFolder) -> None:
    from ..terminal.render import size

    for file in (*found.files, *found.code):
        code = " (code of your own, which builds the network)" if file in found.code else ""
        page.line(("Written: ", "strong"), (str(file), "path"), f", {size(file.stat().st_size)}{code}")
    name = found.folder.resolve().name.removesuffix("-hub")
    upload = command(["upload", f"USER/{name}", str(found.folder)]).replace("normswap", "hf", 1)
    page.line(("Next: ", "strong"), upload)
