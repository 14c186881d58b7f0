"""The user's own command line with one thing changed, ready to paste."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from ...errors import UNSET, PlanError, RevertError, Text
from .flags import words
from .output import ARGS

if TYPE_CHECKING:
    from ...sources.provenance import Weights
    from ...sources.spec import Source

_GROUPING = {
    "indivisible": ("--indivisible",),
    "channels_per_group": ("--groups", "--channels-per-group", "--indivisible"),
    "groups": ("--groups", "--channels-per-group", "--indivisible"),
}
"""Options of the planning that each of these takes the place of."""


@contextmanager
def with_commands(ctx: typer.Context) -> Iterator[None]:
    """Let an error about groups that do not divide the channels end in commands that work."""
    try:
        yield
    except PlanError as error:
        if not error.indivisible:
            raise
        raise PlanError(error.summary, error.problems, hint=_ways_out(error.hint or "", ctx)) from error


def _ways_out(hint: str, ctx: typer.Context) -> Text:
    """The hint, with the whole command below each line that gives an option of the planning."""
    lines: list[str] = []
    for line in Text(hint).lines():
        lines.append(line)
        lines += [
            "  " + repeated(ctx, drop=_GROUPING[fix.option], add=words(fix))
            for fix in line.fixes
            if fix.option in _GROUPING and fix.value is not UNSET
        ]
    return Text.joined("\n", lines)


@contextmanager
def naming_the_original(ctx: typer.Context, source: Source | None, weights: Weights | None) -> Iterator[None]:
    """Let an original that cannot be restored end in the command that names it."""
    try:
        yield
    except RevertError as error:
        way = repeated(ctx, drop=("--reference",), add=("--reference", *building(source, weights)))
        raise RevertError(error.message, hint=f"Give the original as well: {way}") from error


def building(source: Source | None, weights: Weights | None) -> list[str]:
    """SOURCE with the options that make the same network of it again."""
    if source is None:
        return ["ORIGINAL"]
    found = [str(source)]
    for name, value in source.args.items():
        found += ["--arg", f"{name}={value if isinstance(value, str) else repr(value)}"]
    if weights is not None and weights.given is not None:
        found += ["--weights", weights.given]
    return found


def repeated(ctx: typer.Context, *, drop: Sequence[str], add: Sequence[str]) -> str:
    """The user's command line as `changed` changes it, to paste into a shell."""
    return command(changed(ctx.meta.get(ARGS, ()), drop, add))


def command(args: Sequence[str]) -> str:
    """A command line to paste into a shell."""
    return shlex.join(["normswap", *args])


def changed(args: Sequence[str], drop: Sequence[str], add: Sequence[str]) -> list[str]:
    """The arguments without the options in `drop` (each with its value), and with `add` where the first of them was."""
    kept: list[str] = []
    place = None
    skip = False
    for arg in args:
        if skip:
            skip = False
        elif arg.partition("=")[0] in drop:
            place = len(kept) if place is None else place
            skip = "=" not in arg
        else:
            kept.append(arg)
    place = len(kept) if place is None else place
    return [*kept[:place], *add, *kept[place:]]
