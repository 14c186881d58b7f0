"""The folder of a run: the names of its files, and what has to hold before one is begun or resumed there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..errors import CheckpointError, Fix, OutputError, Text

STATE, LAST, BEST = "state.pt", "last.safetensors", "best.safetensors"
METRICS, CURVES, EXAMPLES = "metrics.jsonl", "curves.png", "examples.png"
COMMAND = "run.json"
BOARD = "tensorboard"
_FILES = (STATE, LAST, BEST, METRICS, CURVES, EXAMPLES, COMMAND)


def prepare_folder(folder: Path, *, resume: bool, force: bool, make: bool = True) -> None:
    """Make the folder of a run. Raises OutputError for one that holds another run, or cannot be written.

    make=False only looks.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file", hint=Text(Fix("output"), " takes the folder of a run."))
    if resume:
        if not (folder / STATE).is_file():
            raise CheckpointError(
                f"there is no {folder / STATE} to resume from",
                hint=Text("Leave ", Fix("resume"), " out to begin anew."),
            )
    elif folder.exists() and any((folder / name).exists() for name in (*_FILES, BOARD)) and not force:
        raise OutputError(
            f"{folder} holds a run already",
            hint=Text(
                Fix("resume", True),
                " goes on with it, ",
                Fix("overwrite", True),
                " replaces it, ",
                Fix("output"),
                " names another folder.",
            ),
        )
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK):
        raise OutputError(f"the folder {there} is not writable")
    if not make:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.part"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be used: {error.strerror or error}") from error


def drop_empty(folder: Path) -> None:
    """Remove a folder in which nothing was written."""
    with suppress(OSError):
        folder.rmdir()


def clear(folder: Path) -> None:
    """Remove the files of an older run, now that a new one is about to write its own."""
    for file in (*(folder / name for name in _FILES), *(folder / BOARD).glob("events.out.tfevents.*")):
        file.unlink(missing_ok=True)
