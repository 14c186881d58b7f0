"""The one place where errors become messages and exit codes.

0: done. 1: a problem in the input. 2: a wrong call, which typer or an OptionError tells of. 3: `BelowLimit`.
130: interrupted. 141: nobody reads stdout.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from ...display.printable import printable
from ...errors import NetworkError, NormswapError, OptionError, PlanError, Text, first_line
from ..arguments.options import UsageError
from . import flags
from .output import ARGS, VERBOSE
from .problem_lines import problem_lines
from .streams import is_terminal

WRITTEN = "normswap.written"
FLAGS = "normswap.flags"
_LAYERS = 20
_PACKAGE = Path(__file__).resolve().parents[2]
_ClickException: Any = UsageError.__bases__[0]


class BelowLimit(NormswapError):
    """What was measured, and shown, is below what --fail-below asks for."""

    def __init__(self, name: str, value: float, limit: float) -> None:
        super().__init__(f"{name} {value:.4f} is below {limit:g}")


class Commands(TyperGroup):
    """The command group: runs a command, and turns what it raises into one clear message and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Remember the command line, so that messages can repeat it with one thing changed."""
        ctx.meta[ARGS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _ClickException):
            raise
        except BaseException as error:
            ctx.meta[FLAGS] = _flags_of(self.get_command(ctx, ctx.invoked_subcommand or ""))
            code = report(error, ctx.meta)
            if code is None:
                raise
            raise typer.Exit(code) from None


def report(error: BaseException, meta: Mapping[str, Any]) -> int | None:
    """Say what happened and return the exit code; None for what is no business of ours (SystemExit)."""
    verbose = meta.get(VERBOSE, "--verbose" in meta.get(ARGS, ()))
    if isinstance(error, BrokenPipeError):
        _discard_output()
        return 141
    if isinstance(error, KeyboardInterrupt):
        written = meta.get(WRITTEN)
        say("interrupted; " + (f"{written} is written and complete" if written else "nothing was written"))
        return 130
    if isinstance(error, NormswapError):
        if verbose and error.__cause__ is not None:
            _say_traceback(error.__cause__)
        known = meta.get(FLAGS)
        shown = _of_plan(error, known, verbose) if isinstance(error, PlanError) else error
        say(shown.written(lambda fix: flags.written(fix, known)), prefix="error: ")
        if isinstance(error, BelowLimit):
            return 3
        return 2 if isinstance(error, OptionError) and not isinstance(error, NetworkError) else 1
    if not isinstance(error, Exception):
        return None
    if verbose:
        _say_traceback(error)
    say(_unexpected(error) + ("" if verbose else "\n--verbose shows where it happened."), prefix="error: ")
    if isinstance(error, OSError):
        _discard_output()
    return 1


def _of_plan(error: PlanError, known: Collection[str] | None, verbose: bool) -> NormswapError:
    """The layers before the way out. There may be hundreds of them: alike ones in a line, and not all of them."""
    lines = problem_lines(Text(problem).written(lambda fix: flags.written(fix, known)) for problem in error.problems)
    if len(lines) > _LAYERS and not verbose:
        lines = [*lines[: _LAYERS - 1], f"and {len(lines) - _LAYERS + 1} more lines; --verbose shows them all"]
    hint = Text.joined("\n", [*(f"  {line}" for line in lines), *([error.hint] if error.hint else [])])
    return NormswapError(error.summary, hint=hint)


_MEMORY = ("not enough memory", "out of memory", "can't allocate memory")


def _unexpected(error: Exception) -> str:
    """Only what neither the machine, nor a number, nor the user's own code explains is a bug."""
    text = first_line(error)
    if isinstance(error, MemoryError) or any(words in text for words in _MEMORY):
        return f"there is not enough memory ({text.rpartition('Allocator: ')[2]})"
    if isinstance(error, OverflowError) or "verflow" in text:
        return f"a size or another number is too large ({text})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    if (place := _own_code(error)) is not None:
        return f"the code at {place} failed ({type(error).__name__}: {text})"
    return f"this is a bug in normswap, please report it: {type(error).__name__}: {text}"


def _own_code(error: Exception) -> str | None:
    """FILE:LINE in code of the user's own that failed when normswap or a library called it."""
    libraries = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.resolve().is_relative_to(_PACKAGE):
            place = None  # what happens from here on is normswap's
        elif file.is_file() and not any(file.resolve().is_relative_to(library) for library in libraries):
            place = f"{file}:{line}"
    return place


def _say_traceback(error: BaseException) -> None:
    say("".join(traceback.format_exception(error)).rstrip())


def say(text: str, *, prefix: str = "") -> None:
    """Print to stderr; the prefix stands out on a terminal."""
    if prefix and is_terminal(sys.stderr) and not os.environ.get("NO_COLOR"):
        prefix = typer.style(prefix.strip(), fg="red", bold=True) + " "
    try:
        sys.stderr.write(prefix + printable(text) + "\n")
        sys.stderr.flush()
    except OSError:  # stderr is gone as well
        _discard_output()


def _discard_output() -> None:
    """Point stdout at nothing, so that the interpreter's own flush at exit does not complain again."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
            continue
        with suppress(OSError):  # a stream that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _flags_of(command: Any) -> frozenset[str] | None:
    """The flags of a command; None without one."""
    return None if command is None else frozenset(flag for p in command.params for flag in (*p.opts, *p.secondary_opts))
