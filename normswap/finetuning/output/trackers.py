"""Figures for Weights & Biases and MLflow, through accelerate's trackers."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...errors import NormswapError, OutputError, first_line
from ...files.writing import atomic
from .layout import TRACKED

PROJECT = "normswap"
_WAYS_OUT = {
    "wandb": "`wandb login` once, or WANDB_MODE=offline in the environment, lets it begin.",
    "mlflow": "MLFLOW_TRACKING_URI says where it writes, such as a folder or a server.",
}


def check_installed(names: Iterable[str]) -> None:
    """Raise NormswapError for a tracker whose package is missing. A folder of its name is none."""
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise NormswapError(f"tracking with {name} needs its package", hint=f"pip install {name}")


class Trackers:
    """One run in each of the trackers; a resumed run goes on with those that it had.

    folder: of the run, whose name theirs gets, and where their numbers are kept; None for none. config: what they are
    to show as the run's settings. failed: why some took no more figures, which does not end the training.

    Raises OutputError for a tracker that does not begin.
    """

    def __init__(
        self, names: Iterable[str], folder: Path | None, config: Mapping[str, Any], *, resume: bool = False
    ) -> None:
        self.failed: list[str] = []
        self._trackers: dict[str, Any] = {}
        numbers = _numbers(folder) if resume else {}
        for name in names:
            try:
                self._trackers[name] = _begun(name, folder, config, numbers)
            except Exception as error:  # of another library, its network, its server
                self.close()
                raise OutputError(f"{name} cannot begin: {first_line(error)}", hint=_WAYS_OUT[name]) from error
        if folder is not None and numbers:
            with atomic(folder / TRACKED) as temporary:
                temporary.write_text(json.dumps(numbers) + "\n", encoding="utf-8")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of a step. A tracker that does not take them gets no more."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(dict(figures), step=step)
            except Exception as error:
                self.failed.append(f"{name} took no figures from step {step} on: {first_line(error)}")
                del self._trackers[name]

    def close(self) -> None:
        """End their runs."""
        for name, tracker in self._trackers.items():
            try:
                tracker.finish()
            except Exception as error:
                self.failed.append(f"{name} did not finish: {first_line(error)}")
        self._trackers = {}


def _begun(name: str, folder: Path | None, config: Mapping[str, Any], numbers: dict[str, str]) -> Any:
    """A run in one tracker, whose number is taken from or added to `numbers`."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = name in numbers
    said: dict[str, Any] = {}
    if folder is not None:
        said["name" if name == "wandb" else "run_name"] = folder.resolve().name
    if name == "wandb":
        said |= {"id": numbers.setdefault(name, uuid.uuid4().hex[:8]), "resume": "allow"}
    elif known:
        said["run_id"] = numbers[name]
    project = os.environ.get("WANDB_PROJECT") if name == "wandb" else None  # MLflow's own is seen to by accelerate
    tracker: Any = LOGGER_TYPE_TO_CLASS[name](project or PROJECT, **said)
    if hasattr(tracker, "start"):  # earlier versions of accelerate have begun by now
        tracker.start()
    if not known:
        tracker.store_init_configuration(dict(config))
    if name == "mlflow":
        numbers[name] = tracker.tracker.info.run_id
    return tracker


def _numbers(folder: Path | None) -> dict[str, str]:
    """Those of an earlier part of the run."""
    try:
        found = json.loads((folder / TRACKED).read_text(encoding="utf-8")) if folder is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
