"""Where a command's words go: its result to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

import typer

from ...display.progress import Line, Lines, Silent
from ..arguments.options import usage
from .streams import Lasting, is_terminal, printable

if TYPE_CHECKING:
    from .render import Page

T = TypeVar("T")


class Output:
    """What one run of a command says. `show` prints the result; `step`, `note` and `track` talk about the work."""

    def __init__(self, stdout: TextIO, stderr: TextIO, *, as_json: bool, quiet: bool) -> None:
        self._stdout, self._stderr = stdout, stderr
        self._json, self._quiet = as_json, quiet
        self.live = not quiet and is_terminal(stderr)
        self._line = False
        self._bar: Line | None = None

    def step(self, what: str) -> None:
        """Say what is being done: one line that is overwritten on a terminal, lines of their own elsewhere."""
        if self._quiet:
            return
        self._clear()
        self._stderr.write(printable(f"{what} …") + ("" if self.live else "\n"))
        self._stderr.flush()
        self._line = self.live

    def note(self, text: str) -> None:
        """Something the user should know that is no error."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.above(f"note: {printable(text)}")
            return
        self._clear()
        self._stderr.write(f"note: {printable(text)}\n")

    def track(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """Pass the items on while showing how many of `total` are done."""
        with self.bar(what) as tell:
            for done, item in enumerate(items):
                tell(done, total, "")
                yield item

    @contextmanager
    def bar(self, what: str) -> Iterator[Line]:
        """A progress line for work that tells how far it is; lines now and then where there is no terminal."""
        self._clear()
        if not self.live:
            yield Lines(printable(what), self._stderr) if not self._quiet else Silent(what, self._stderr)
            return
        self._bar = Line(printable(what), self._stderr)
        try:
            yield self._bar
        finally:
            self._bar.close()
            self._bar = None

    def show(self, values: Callable[[], Mapping[str, Any]], page: Callable[[Page], None]) -> None:
        """The result, on stdout: `values` as JSON if that was asked for, else what `page` puts on a page."""
        self._clear()
        if self._json:
            self._stdout.write(json.dumps(values(), indent=2, allow_nan=False) + "\n")
        elif not self._quiet:
            from .render import Page

            page(Page(self._stdout))
        self._stdout.flush()

    def _clear(self) -> None:
        if self._line:
            self._stderr.write("\r\x1b[2K")
            self._line = False

    def close(self) -> None:
        """Leave no half line behind."""
        self._clear()
        self._stderr.flush()


@contextmanager
def reporting(ctx: typer.Context, *, silent: bool = False) -> Iterator[Output]:
    """What the command says, as --json, --quiet and --verbose ask; with `silent`, nothing whatever they ask.

    Within it, stdout is the result's alone: what libraries and the user's own code print goes to stderr. Warnings of
    libraries are shown with --verbose only.
    """
    as_json, verbose = (ctx.params[name] and not silent for name in ("json", "verbose"))
    quiet = ctx.params["quiet"] or silent
    if quiet and verbose:
        raise usage(ctx, "--quiet and --verbose exclude each other")
    ctx.meta[VERBOSE] = verbose
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a narrow encoding must not stop the work
            stream.reconfigure(errors="backslashreplace")
    stderr = cast(TextIO, Lasting(sys.stderr))
    output = Output(sys.stdout, stderr, as_json=as_json, quiet=quiet)
    with ExitStack() as stack:
        stack.callback(output.close)
        stack.enter_context(redirect_stderr(stderr))
        if quiet:
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        stack.enter_context(redirect_stdout(sys.stderr))
        if not verbose:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield output


VERBOSE = "normswap.verbose"
