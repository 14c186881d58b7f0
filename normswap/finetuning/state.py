"""What a run is made of at a step, as one file that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ..errors import CheckpointError, OutputError
from ..training.state import load_state, save_state

STATE, LAST, BEST = "state.pt", "last.safetensors", "best.safetensors"
_OURS = (STATE, LAST, BEST, "metrics.jsonl", "curves.png", "examples.png", "tensorboard", "run.json")


def prepare_folder(folder: Path, *, resume: bool, force: bool, make: bool = True) -> None:
    """Make the folder of a run. Raises OutputError for one that holds another run, or cannot be written.

    make=False only looks.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file", hint="--output takes the folder of a run.")
    if resume:
        if not (folder / STATE).is_file():
            raise CheckpointError(
                f"there is no {folder / STATE} to resume from", hint="Leave --resume out to begin anew."
            )
    elif folder.exists() and any((folder / name).exists() for name in _OURS) and not force:
        raise OutputError(
            f"{folder} holds a run already",
            hint="--resume goes on with it, --force replaces it, --output names another folder.",
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


def clear(folder: Path) -> None:
    """Remove the files of an older run, now that a new one is about to write its own."""
    for name in (STATE, LAST, BEST, "metrics.jsonl", "curves.png", "examples.png"):
        (folder / name).unlink(missing_ok=True)


def save_run(
    path: Path,
    settings: Mapping[str, Any],
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    average: AveragedModel | None,
    scaler: Any,
    standing: Mapping[str, Any],
) -> None:
    """Write everything that decides how the run goes on. Raises OutputError."""
    state = {
        "step": step,
        "parameters": _cpu(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "average": None if average is None else _cpu(average.state_dict()),
        "scaler": None if scaler is None else scaler.state_dict(),
        "standing": dict(standing),
    }
    save_state(path, settings, state)


def restore_run(
    path: Path,
    settings: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    average: AveragedModel | None,
    scaler: Any,
) -> tuple[int, dict[str, Any]]:
    """Put model, optimizer, average and scaler where the file has them. Returns the step, and what stood beside it.

    Raises CheckpointError for a file that is damaged or of another network, and OptionError for other settings.
    """
    state = load_state(path, settings, model.state_dict())
    model.load_state_dict(state["parameters"])
    optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        average.load_state_dict(state["average"])
    if scaler is not None:
        scaler.load_state_dict(state["scaler"])
    return state["step"], state["standing"]


def _cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
