"""The command line. One command per file: parse, call the API, render. Starting it imports neither torch nor rich."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer

from .boundary import report
from .calibrate import calibrate
from .convert import convert
from .demo import demo
from .distil import distil
from .finetune import finetune
from .help import Command, Convert, Root
from .inspect import inspect
from .norms import norms
from .recipes import recipes
from .verify import verify

app = typer.Typer(
    cls=Root,
    help="Swap the BatchNorm layers of pretrained PyTorch networks for GroupNorm and others, and keep the accuracy.",
    no_args_is_help=True,
    rich_markup_mode=None,  # by hand in `help`: rich would double the time that it takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command, short_help="List every norm layer of a network.")(inspect)
app.command(cls=Convert, short_help="Replace the norm layers of a network and write the result.")(convert)
app.command(cls=Command, short_help="Repair a converted network from a few unlabelled images.")(calibrate)
app.command(cls=Command, short_help="Train a converted network to follow its original, without labels.")(distil)
app.command(cls=Command, short_help="Train a network on labelled images, at small batches.")(finetune)
app.command(cls=Command, short_help="Measure how far one network is from another.")(verify)
app.command(cls=Command, short_help="List the recipes, or copy one.")(recipes)
app.command(cls=Command, short_help="List the norm types.")(norms)
app.command(cls=Command, short_help="Show the whole story on handwritten digits, in under a minute.")(demo)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

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
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(prog_name="normswap")
    except (KeyboardInterrupt, OSError) as error:  # before a command began
        sys.exit(report(error, {}))
    except _Terminated:
        sys.exit(128 + signal.SIGTERM)


class _Terminated(BaseException):
    """SIGTERM: no error that anyone should handle, but what was half written is removed on the way out."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated
