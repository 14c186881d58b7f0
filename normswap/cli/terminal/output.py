"""Where a command's words go: its result to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

import typer

from ...display.printable import printable
from ...display.progress import Line, Lines, Silent
from ...errors import OutputError, Text
from ..arguments.options import usage
from ..arguments.places import check_places
from .flags import told
from .streams import Lasting, is_terminal

if TYPE_CHECKING:
    from .render import Page

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """A page to write. command: its name; line: as it was typed."""

    path: Path
    command: str
    line: str

    @classmethod
    def of(cls, ctx: typer.Context, path: Path) -> Report:
        """Raises OutputError, before any work is done, for a place where it cannot go."""
        from ...files.writing import check_writable

        if path.suffix.lower() not in (".html", ".htm") and not path.is_dir():
            raise OutputError(f"{path} is not a name for a report", hint=f"Name it {path.with_suffix('.html')}.")
        name = ctx.command.name or ""
        goes_on = ctx.params.get("resume") or (name == "compare" and _is_of(path, name))  # as its tables do
        check_writable(path, overwrite=bool(ctx.params.get("force") or goes_on))
        return cls(path, name, shlex.join(["normswap", *ctx.meta.get(ARGS, ())]))

    def write(self, values: Mapping[str, Any]) -> None:
        """values: what the command prints with --json."""
        from ...pages.page import write_page

        write_page(self.path, self.command, self.line, _with_flags(values))


def _is_of(path: Path, command: str) -> bool:
    """Whether that is a page that this command wrote."""
    return path.is_file() and f"<h1>normswap {command}</h1>".encode() in path.read_bytes()


def _with_flags(value: Any) -> Any:
    """JSON values with the options in their texts as flags."""
    if isinstance(value, Text):
        return told(value)
    if isinstance(value, Mapping):
        return {key: _with_flags(each) for key, each in value.items()}
    return [_with_flags(each) for each in value] if isinstance(value, (list, tuple)) else value


class Output:
    """What one run of a command says. `show` prints the result; `step`, `note` and `track` talk about the work."""

    def __init__(
        self, stdout: TextIO, stderr: TextIO, *, as_json: bool, quiet: bool, report: Report | None = None
    ) -> None:
        self._stdout, self._stderr, self._report = stdout, stderr, report
        self._json, self._quiet = as_json, quiet
        self.live = not quiet and is_terminal(stderr)
        self._line = False
        self._bar: Line | None = None
        self._noted = set[str]()

    def step(self, what: str) -> None:
        """Say what is being done: one line that is overwritten on a terminal, lines of their own elsewhere."""
        if self._quiet:
            return
        self._clear()
        self._stderr.write(printable(f"{what} …") + ("" if self.live else "\n"))
        self._stderr.flush()
        self._line = self.live

    def note(self, text: str) -> None:
        """Something the user should know that is no error; told once."""
        if self._quiet or text in self._noted:
            return
        self._noted.add(text)
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
        """The result, on stdout: `values` as JSON if that was asked for, else what `page` puts on a page.

        The report, where one was asked for, is made of the same values.
        """
        self._clear()
        found = values() if self._json or self._report is not None else {}
        if self._report is not None:
            self._report.write(found)
        if self._json:
            self._stdout.write(json.dumps(found, indent=2, allow_nan=False) + "\n")
        elif not self._quiet:
            from .render import Page

            page(shown := Page(self._stdout))
            if self._report is not None:
                shown.line(("Report: ", "strong"), (str(self._report.path), "path"))
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
    """What the command says, as --json, --quiet, --verbose and --report ask; with `silent`, nothing whatever they ask.

    Within it, stdout is the result's alone: what libraries and the user's own code print goes to stderr. Warnings of
    libraries are shown with --verbose only.
    """
    as_json, verbose = (ctx.params[name] and not silent for name in ("json", "verbose"))
    quiet = ctx.params["quiet"] or silent
    if quiet and verbose:
        raise usage(ctx, "--quiet and --verbose exclude each other")
    ctx.meta[VERBOSE] = verbose
    check_places(ctx)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a narrow encoding must not stop the work
            stream.reconfigure(errors="backslashreplace")
    stderr = cast(TextIO, Lasting(sys.stderr))
    report = None if silent else ctx.params.get("report")
    wanted = None if report is None else Report.of(ctx, report)
    output = Output(sys.stdout, stderr, as_json=as_json, quiet=quiet, report=wanted)
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


ARGS = "normswap.args"
VERBOSE = "normswap.verbose"
