"""The user's own command line with one thing changed, ready to paste."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

from ..errors import PlanError
from .boundary import ARGS

_GROUPING = ("--groups", "--channels-per-group", "--indivisible")


@contextmanager
def with_commands(ctx: typer.Context) -> Iterator[None]:
    """Let an error about groups that do not divide the channels end in commands that work."""
    try:
        yield
    except PlanError as error:
        if not getattr(error, "indivisible", False):
            raise
        ways = _ways_out(error.hint or "", ctx.meta.get(ARGS, ()))
        raise PlanError(error.summary, error.problems, hint=ways) from error


def _ways_out(hint: str, args: Sequence[str]) -> str:
    """The Python API's hint with its arguments as commands; what it says of other problems stays."""
    fitting = re.search(r"channels_per_group=(\d+)", hint)
    others = [line for line in hint.splitlines() if not re.search(r"indivisible=|channels_per_group=|groups=", line)]
    lines = ["The largest divisor below the number asked for, where that does not divide:"]
    lines += ["  " + command(changed(args, ("--indivisible",), ("--indivisible", "nearest")))]
    if fitting:
        lines += [f"{fitting[1]} channels in each group, which fits every layer:"]
        lines += ["  " + command(changed(args, _GROUPING, ("--channels-per-group", fitting[1])))]
    else:
        lines += ["A number that fits for each layer, of about 16 channels a group:"]
        lines += ["  " + command(changed(args, _GROUPING, ("--groups", "auto")))]
    return "\n".join(lines + others)


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
