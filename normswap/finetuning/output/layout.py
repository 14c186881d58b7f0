"""The folder of a run: the names of its files, and what has to hold before one is begun or resumed there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from shutil import rmtree

from ...errors import CheckpointError, Fix, OptionError, OutputError, Text
from ...files.locking import locked
from ...files.writing import check_kept

STATE, LAST, BEST = "state.pt", "last.safetensors", "best.safetensors"
METRICS, CURVES, EXAMPLES, CONFUSION = "metrics.jsonl", "curves.png", "examples.png", "confusion.png"
COMMAND = "run.json"
BOARD, TRACKED = "tensorboard", "trackers.json"
_FILES = (STATE, LAST, BEST, METRICS, CURVES, EXAMPLES, CONFUSION, COMMAND, TRACKED)


@contextmanager
def run_folder(folder: Path, *, resume: bool, force: bool, inputs: Iterable[Path] = ()) -> Iterator[None]:
    """Within it, the folder of a run is there and nobody else's; a new one in which nothing was written goes again.

    inputs: files that a new run must not replace. Raises OutputError for a folder that holds another run, that another
    process is at work in, or that cannot be written, and CheckpointError where there is nothing to resume.
    """
    _check_folder(folder, resume=resume, force=force)
    if not resume:
        kept = list(inputs)
        for name in _FILES:
            check_kept(folder / name, kept)
    made = list(takewhile(lambda place: not place.exists(), (folder, *folder.parents)))
    older = {place for place in (*(folder / name for name in _FILES), folder / BOARD) if place.exists()}
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder} cannot be used: {error.strerror or error}") from error
        with locked(folder):
            _check_folder(folder, resume=resume, force=force)  # somebody may have begun before the lock was ours
            for left in folder.glob(".*.part"):  # of a run that was killed while it wrote
                rmtree(left, ignore_errors=True)
            try:
                yield
            except BaseException:
                if not (folder / STATE).exists():  # nothing to go on from, as when the disk was full
                    _drop(folder, older)
                raise
    finally:
        with suppress(OSError):  # the first that is not empty
            for place in made:
                place.rmdir()


def _drop(folder: Path, older: Set[Path]) -> None:
    """Remove the files of a run that has come to nothing, but none that were there before it."""
    for name in _FILES:
        if folder / name not in older:
            with suppress(OSError):
                (folder / name).unlink()
    if folder / BOARD not in older:
        rmtree(folder / BOARD, ignore_errors=True)


def check_outside(folder: Path, places: Iterable[object]) -> None:
    """What a run writes must not become data. Raises OptionError for a folder within one of the places."""
    for place in places:
        if isinstance(place, Path) and folder.resolve().is_relative_to(place.resolve()):
            raise OptionError(
                f"the output folder {folder} is within the data, {place}",
                hint=Text("Name another ", Fix("output"), "."),
            )


def _check_folder(folder: Path, *, resume: bool, force: bool) -> None:
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


def clear(folder: Path) -> None:
    """Remove the files of an older run, now that a new one is about to write its own."""
    for file in (*(folder / name for name in _FILES), *(folder / BOARD).glob("events.out.tfevents.*")):
        file.unlink(missing_ok=True)
