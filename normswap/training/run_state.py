"""The file from which an interrupted training run goes on, bit for bit."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.record import record_of
from ..errors import CheckpointError, Fix, OptionError, OutputError, Text, first_line, plainly
from ..files.writing import atomic, check_writable
from ..planning.plan import Step

FORMAT = 1


_OF_OLD = {"path", "aliases", "source", "source_class", "channels", "target", "options", "transfer", "producers"}
_OF_OLD |= {"dims", "zero_init", "note"}


def network_digest(model: nn.Module) -> str:
    """Tells whether the state of a run belongs to this network: a hash of its plan and of its tensors' shapes.

    A field that the plan's steps got later counts where it has another value than its default, so that states of
    before go on.
    """
    record = record_of(model)
    plan = None if record is None else record.plan.to_dict()
    if plan is not None:
        later = {f.name: f.default for f in fields(Step) if f.name not in _OF_OLD}
        plan["steps"] = [{k: v for k, v in s.items() if k not in later or v != later[k]} for s in plan["steps"]]
    shapes = {name: list(t.shape) for name, t in model.state_dict().items()}
    return hashlib.sha256(json.dumps([plan, shapes], sort_keys=True, default=str).encode()).hexdigest()


def save_state(path: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write what a run has reached, whole or not at all, in place of an older file. Raises OutputError."""
    check_writable(path, overwrite=True)
    with atomic(path) as temporary:
        try:
            torch.save({"format": FORMAT, "settings": dict(settings), **state}, temporary)
        except RuntimeError as error:  # of its zip writer, which does not say why
            (temporary.parent / "probe").write_bytes(bytes(1 << 16))  # raises what does: that the disk is full
            raise OutputError(f"{path} cannot be written: {first_line(error)}") from error


def load_state(
    path: Path,
    settings: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    explain: Callable[[Mapping[str, Any]], Collection[str] | None] | None = None,
) -> dict[str, Any]:
    """What `save_state` wrote, for a run with the same settings and parameters; tensors on the CPU.

    explain: given what was found, to raise an error of its own where it has better words, or to name settings that
    follow from others, and are told only where these do not differ.
    Read without running any code in it. Raises CheckpointError for a file that is missing, damaged, or no training
    state, and OptionError for one of a run with other settings, which could not go on as it began.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is not a complete training state", hint="Begin anew, from the network that was saved last."
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or "settings" not in found:
        raise CheckpointError(
            f"{path} is no training state of this version",
            hint=Text("Resume from the file that ", Fix("checkpoint"), " named."),
        )
    found["settings"] = _in_words_of_today(found["settings"], settings)
    following = None if explain is None else explain(found)
    _check(path, found, settings, parameters, following or ())
    return found


def _in_words_of_today(theirs: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that another version named or wrote otherwise, but that are the same."""
    found = dict(theirs)
    if "distil" in settings and "distill" in found:
        found["distil"] = found.pop("distill")
    if isinstance(settings.get("augment"), str) and isinstance(found.get("augment"), bool):
        found["augment"] = "auto" if found["augment"] else "none"
    return found


def _was(name: str, value: Any) -> tuple[str | Fix, ...]:
    """A setting as the run began with it."""
    return ("no ", Fix(name)) if value is None else (Fix(name, value),)


def _check(
    path: Path,
    found: dict[str, Any],
    settings: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    following: Collection[str],
) -> None:
    theirs = found["settings"]
    differing = [k for k in settings if theirs.get(k) != settings[k]]
    if "network" in differing:
        raise OptionError(f"{path} is the state of another network, or of another conversion of this one")
    if differing:
        was = [Text(*_was(k, theirs.get(k)), f" (now {plainly(settings[k])})") for k in differing if k not in following]
        raise OptionError(
            Text(f"{path} is the state of a run with ", Text.joined(", ", was)),
            hint="Resume with the settings it began with.",
        )
    shapes = {name: tuple(t.shape) for name, t in found["parameters"].items()}
    if shapes != {name: tuple(t.shape) for name, t in parameters.items()}:
        raise CheckpointError(f"the parameters in {path} do not fit the network")
