"""The one place where errors become messages and exit codes.

0: done. 1: a problem in the input. 2: a wrong call, which typer or an OptionError tells of.
130: interrupted. 141: nobody reads stdout.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import NetworkError, NormswapError, OptionError
from .options import UsageError
from .output import VERBOSE
from .terminal import is_terminal, printable

ARGS = "normswap.args"
WRITTEN = "normswap.written"
_ClickException: Any = UsageError.__bases__[0]
_OPTIONS = ("indivisible", "channels_per_group", "groups", "transfer", "eps")


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
        say(_as_flags(str(error)), prefix="error: ")
        return 2 if isinstance(error, OptionError) and not isinstance(error, NetworkError) else 1
    if not isinstance(error, Exception):
        return None
    if verbose:
        _say_traceback(error)
    say(_unexpected(error) + ("" if verbose else "\n--verbose shows where it happened."), prefix="error: ")
    if isinstance(error, OSError):
        _discard_output()
    return 1


def _unexpected(error: Exception) -> str:
    text = (str(error).strip() or "no message").splitlines()[0][:300]
    if isinstance(error, MemoryError) or "not enough memory" in text or "out of memory" in text:
        return f"there is not enough memory ({text})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return f"this is a bug in normswap, please report it: {type(error).__name__}: {text}"


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


def _as_flags(text: str) -> str:
    """A message of the Python API in the words of the command line: `groups="auto"` as `--groups auto`."""
    text = re.sub(r'rules=\{"([^"]*)": "([^"]*)"\}', r"--rule '\1=\2'", text)
    text = re.sub(r"(--[\w-]+) \(\w+=[^()]*\)", r"\1", text)
    text = re.sub(r"\b\w+=\S* \((--[\w-]+)\)", r"\1", text)
    text = re.sub(r"\b\w+=(?:/|\w+ or )(--[\w-]+)", r"\1", text)
    options = "|".join(_OPTIONS)
    return re.sub(rf'(?<![\w-])({options})="?([\w.]+)"?', lambda m: f"--{m[1].replace('_', '-')} {m[2]}", text)
