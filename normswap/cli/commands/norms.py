"""`normswap norms`: the norm types, their formulas, and what becomes of a network from each to each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..arguments import options
from ..terminal.output import reporting

if TYPE_CHECKING:
    from ...norms.spec import NormSpec
    from ...planning.matrix import Conversion
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
    """List the norm types that --to and --rule take: formula, what the statistics are taken over, what becomes what.

    The matrix says what becomes of the outputs: exact, they stay the same; close, they start near; needs images, with
    --calibrate; refused, no plan is made. It is the planner's own answer for a small network with each norm.
    """
    with reporting(ctx) as out:
        from ...norms.registry import norm_named, specs

        chosen = specs() if name is None else (norm_named(name),)
        cells = _cells(chosen)
        out.show(
            lambda: {
                "norms": [_values(spec) for spec in chosen],
                "conversions": [cell.to_dict() for cell in cells],
            },
            lambda page: _render(page, chosen, cells),
        )


def _cells(chosen: tuple[NormSpec, ...]) -> list[Conversion]:
    """The whole matrix, or the row and the column of one norm."""
    from ...norms.registry import specs
    from ...planning.matrix import conversions

    row = conversions(chosen, specs())
    return row if len(chosen) > 1 else row + [c for c in conversions(specs(), chosen) if c not in row]


def _values(spec: NormSpec) -> dict[str, Any]:
    from ...norms.registry import exact_from

    fields = {field: getattr(spec, field) for field in ("name", "title", "formula", "axes")}
    return fields | {"exact_from": exact_from(spec), "source": spec.source, "target": spec.build is not None}


def _render(page: Page, specs: tuple[NormSpec, ...], cells: list[Conversion]) -> None:
    for i, spec in enumerate(specs):
        if i:
            page.gap()
        page.line((f"{spec.name:<12}", "strong"), (spec.title, "path"))
        page.block(spec.formula)
        page.facts(
            ("statistics over", spec.axes),
            ("exact from", ", ".join(c.source for c in cells if c.target == spec.name and c.outcome == "exact") or "-"),
            ("source", spec.source),
        )
    page.gap()
    if len(specs) > 1:
        _matrix(page, cells)
    else:
        _row_and_column(page, specs[0].name, cells)


_SHORT = {"exact": "=", "close": "~", "refused": "-", "needs images": "+"}
_STYLES = {"exact": "good", "close": "", "needs images": "bad", "refused": "dim"}


def _stacked(name: str) -> str:
    """A name in lines of five letters at most, so that a column of signs is narrow."""
    parts = (part if len(part) < 6 else f"{part[:4]}-\n{part[4:]}" for part in name.split("-"))
    return "-\n".join(parts)


def _matrix(page: Page, cells: list[Conversion]) -> None:
    """A row a source, a column a target: in words where they fit, otherwise in signs."""
    from ...planning.matrix import notes

    sources, targets = list(dict.fromkeys(c.source for c in cells)), list(dict.fromkeys(c.target for c in cells))
    wide = page.width >= max(map(len, sources)) + sum(2 + max(len("refused"), len(target)) for target in targets)
    at = {(c.source, c.target): str(c.outcome) for c in cells}
    titles = targets if wide else [_stacked(name) for name in targets]

    def cell(outcome: str) -> tuple[str, str]:
        words = outcome.removeprefix("needs ") if wide else _SHORT[outcome]
        return words, _STYLES[outcome]

    rows = [[(source, "path"), *(cell(at[source, target]) for target in targets)] for source in sources]
    page.table(["from \\ to", *titles], rows)
    signs = "images: needs images" if wide else ", ".join(f"{sign} {words}" for words, sign in _SHORT.items())
    page.line((f"{signs} (--calibrate)", "dim"))
    page.gap()
    for note in notes(cells):
        page.line((note, "dim"))


def _row_and_column(page: Page, name: str, cells: list[Conversion]) -> None:
    told = [": ".join(filter(None, (c.note, c.why))) for c in cells]
    rows: list[list[Any]] = [
        [(c.source, "path"), (c.target, "path"), (str(c.outcome), _STYLES[c.outcome]), words]
        for c, words in zip(cells, told, strict=True)
    ]
    page.table(["from", "to", "outputs", "note"], rows)
