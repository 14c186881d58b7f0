"""`normswap norms`: the norm types, their formulas, and which conversions are exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..arguments import options
from ..terminal.output import reporting

if TYPE_CHECKING:
    from ...norms.spec import NormSpec
    from ..terminal.render import Page


def norms(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only this one.", autocompletion=options.norm_names)
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """List the norm types that --to and --rule take: formula, what the statistics are taken over, exact conversions."""
    with reporting(ctx) as out:
        from ...norms.registry import norm_named, specs

        chosen = specs() if name is None else (norm_named(name),)
        out.show(lambda: {"norms": [_values(spec) for spec in chosen]}, lambda page: _render(page, chosen))


def _values(spec: NormSpec) -> dict[str, Any]:
    from ...norms.registry import exact_from

    fields = {field: getattr(spec, field) for field in ("name", "title", "formula", "axes")}
    return fields | {"exact_from": exact_from(spec), "source": spec.source, "target": spec.build is not None}


def _render(page: Page, specs: tuple[NormSpec, ...]) -> None:
    from ...norms.registry import exact_from

    for i, spec in enumerate(specs):
        if i:
            page.gap()
        page.line((f"{spec.name:<12}", "strong"), (spec.title, "path"))
        page.block(spec.formula)
        page.facts(
            ("statistics over", spec.axes),
            ("exact from", ", ".join(exact_from(spec)) or "-"),
            ("source", spec.source),
        )
