"""Files and folders that a command is to read: those that are not there are told before anything takes time."""

from __future__ import annotations

from pathlib import Path

import typer

from ...choices import STAND_INS
from ...errors import CheckpointError, DataError, WeightsError
from .datasets import TORCHVISION
from .options import stands_in

_CHECKPOINTS = (".safetensors", ".pth", ".pt", ".th", ".ckpt", ".bin", ".pkl", ".tar", ".json")


def check_places(ctx: typer.Context) -> None:
    """Raise DataError, WeightsError or CheckpointError for the first that is missing."""
    said = ctx.params
    for name in ("data", "eval_data"):
        _check_images(said.get(name), calibrates=ctx.command.name == "calibrate")
    if said.get("calibrate") != "none":
        _check_images(said.get("calibrate"), calibrates=True)
    for name in ("annotations", "eval_annotations"):
        if (file := said.get(name)) is not None and not Path(file).exists():
            raise DataError(f"{file} does not exist")
    if (file := said.get("evaluation")) is not None and not Path(file).exists():
        raise CheckpointError(f"{file} does not exist", hint=f"normswap evaluate FILE --data FOLDER -o {file}")
    weights = said.get("weights")
    if weights is not None and Path(weights).suffix in _CHECKPOINTS and not Path(weights).exists():
        raise WeightsError(f"{weights} does not exist")


def _check_images(place: str | Path | None, *, calibrates: bool) -> None:
    if place is None or str(place).startswith(TORCHVISION) or Path(place).exists():
        return
    if not calibrates:
        raise DataError(f"there is no folder {place}", hint="Give a folder of images or of class folders.")
    if not stands_in(str(place)):
        hint = f"Give a folder of images; {' and '.join(STAND_INS)} stand in for one."
        raise DataError(f"there is no folder {place}", hint=hint)
