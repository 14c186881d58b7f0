"""The command line. One command per file: parse, call the API, render. Starting it imports neither torch nor rich."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any

import typer

from .commands._finetune_job import Finetune
from .commands.advise import advise
from .commands.calibrate import calibrate
from .commands.card import card
from .commands.compare import compare
from .commands.convert import convert
from .commands.demo import demo
from .commands.distil import distil
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.finetune import finetune
from .commands.inspect import inspect
from .commands.norms import norms
from .commands.recipes import recipes
from .commands.verify import verify
from .terminal.errors import report
from .terminal.help import Command, Convert, Root

app = typer.Typer(
    cls=Root,
    help="Swap the BatchNorm layers of pretrained PyTorch networks for GroupNorm and others, and keep the accuracy.",
    no_args_is_help=True,
    rich_markup_mode=None,  # by hand in `help`: rich would double the time that it takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command, short_help="List every norm layer of a network.")(inspect)
app.command(cls=Command, short_help="Recommend a norm for a network and its task.")(advise)
app.command(cls=Convert, short_help="Replace the norm layers of a network and write the result.")(convert)
app.command(cls=Command, short_help="Repair a converted network from a few unlabelled images.")(calibrate)
app.command(cls=Command, short_help="Train a converted network to follow its original, without labels.")(distil)
app.command(cls=Finetune, short_help="Train a network on labelled images, at small batches.")(finetune)
app.command(cls=Command, short_help="Compare norms, groups and batch sizes under equal conditions.")(compare)
app.command(cls=Command, short_help="Measure how far one network is from another.")(verify)
app.command(cls=Command, short_help="Measure one network on labelled data.")(evaluate)
app.command(cls=Command, short_help="Write a network for another runtime, such as ONNX.")(export)
app.command(cls=Command, short_help="Write a folder for the Hugging Face hub.")(card)
app.command(cls=Command, short_help="List the recipes, or copy one.")(recipes)
app.command(cls=Command, short_help="List the norm types.")(norms)
app.command(cls=Command, short_help="Show the whole story on handwritten digits, in under a minute.")(demo)


def _version(wanted: bool) -> None:
    if wanted:
        from ..version import __version__

        typer.echo(f"normswap {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The `normswap` command."""
    _open_streams()
    for number in _STOPPING:
        if number != _HANGUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, _terminate)
    try:
        app(prog_name="normswap")
    except (KeyboardInterrupt, OSError) as error:  # before a command began
        sys.exit(report(error, {}))
    except _Terminated as end:
        sys.exit(128 + end.number)


def _open_streams() -> None:
    """Where a shell has closed a stream (`>&-`), what goes there is dropped, not written into the next file opened."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")


_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
_STOPPING = [number for number in (signal.SIGTERM, _HANGUP) if number is not None]


class _Terminated(BaseException):
    """SIGTERM or SIGHUP: no error that anyone should handle, but what was half written is removed on the way out."""

    def __init__(self, number: int) -> None:
        self.number = number


def _terminate(number: int, frame: Any) -> None:
    if _HANGUP is not None:  # of a closed terminal there come several, which must not disturb the way out
        signal.signal(_HANGUP, signal.SIG_IGN)
    raise _Terminated(number)
