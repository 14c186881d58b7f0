"""`normswap recipes`: what recipes there are; copy one next to the user."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..arguments import options
from ..terminal.errors import WRITTEN
from ..terminal.output import reporting

if TYPE_CHECKING:
    from ..recipe_catalog import Recipe
    from ..terminal.render import Page


def _names(incomplete: str) -> list[str]:
    """Completion of a recipe's name."""
    from .. import recipe_catalog

    return [recipe.name for recipe in recipe_catalog.recipes() if recipe.name.startswith(incomplete)]


def recipes(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Copy this one.", autocompletion=_names, show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT", help="The file or folder to copy to.", show_default="./<NAME>.py"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """List the recipes, or copy one next to you: a script of one file with one outcome, to run and to change.

    \b
    normswap recipes
    normswap recipes freeze_statistics
    """
    if name is None and (output is not None or force):
        raise options.usage(ctx, "--output and --force go with the name of a recipe")
    with reporting(ctx) as out:
        from .. import recipe_catalog
        from ..recipe_catalog import recipe

        if name is None:
            found = recipe_catalog.recipes()
            out.show(lambda: {"recipes": [r.to_dict() for r in found]}, lambda page: _list(page, found))
            return
        chosen = recipe(name)
        written = _copied(chosen, output or Path(), force)
        ctx.meta[WRITTEN] = written
        out.show(lambda: chosen.to_dict() | {"written": str(written)}, lambda page: _written(page, chosen, written))


def _copied(chosen: Recipe, output: Path, force: bool) -> Path:
    from ...files.writing import atomic, check_writable

    target = output / chosen.file.name if output.is_dir() else output
    check_writable(target, overwrite=force, inputs=[chosen.file])
    with atomic(target) as temporary:
        temporary.write_bytes(chosen.file.read_bytes())
    return target


def _list(page: Page, found: tuple[Recipe, ...]) -> None:
    if page.terminal:
        page.table(("recipe", "goal", "time"), [((r.name, "strong"), r.goal, r.time) for r in found])
    else:  # lines for grep and less, which a table without a width would be too wide for
        page.table(("recipe", "goal"), [(r.name, r.gist) for r in found])
    page.gap()
    page.line("normswap recipes NAME copies one.")


def _written(page: Page, chosen: Recipe, written: Path) -> None:
    page.line(("Written: ", "strong"), (str(written), "path"))
    page.facts(
        ("goal", chosen.goal),
        ("command", chosen.command.replace(f"recipes/{chosen.file.name}", str(written))),
        ("time", chosen.time),
        ("expected", chosen.expected),
    )
