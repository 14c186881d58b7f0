"""Options as the command line writes them: what Python calls `groups=32` is `--groups 32` here."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from typing import Any

from ...choices import STAND_INS
from ...errors import UNSET, Fix, Text

_NAMES = {"args": "--arg", "example_inputs": "--input", "overwrite": "--force", "rules": "--rule", "sources": "--from"}
"""Flags that are not called as the argument is."""
_VALUES: dict[tuple[str, Any], list[str]] = {
    ("check", False): ["--no-check"],
    ("clip_grad", None): ["--clip-grad", "0"],
    ("stabilize", False): ["--no-stabilize"],
    ("strict", False): ["--approximate"],
    ("undo", False): ["--no-undo"],
}
"""Values that have a flag of their own."""


def words(fix: Fix) -> list[str]:
    """The words of a command line that give this option, without quotes."""
    flag = _NAMES.get(fix.option, "--" + fix.option.replace("_", "-"))
    if isinstance(fix.value, Mapping):
        return [word for key, value in fix.value.items() for word in (flag, f"{key}={value}")]
    if (known := _VALUES.get((fix.option, fix.value))) is not None:
        return known
    return [flag] if fix.value is UNSET or fix.value is True else [flag, str(fix.value)]


def written(fix: Fix, known: Collection[str] | None = None) -> str | None:
    """The option for a sentence; None for one that is none of the flags `known` to the command."""
    if fix.option == "data" and fix.value in STAND_INS and known is not None and "--calibrate" in known:
        fix = Fix("calibrate", fix.value)  # where --data are images to train on, or there is none
    found = words(fix)
    if known is not None and found[0] not in known:
        return None
    if fix.option == "rules" and fix.value is not UNSET:
        return " ".join(f"--rule '{pattern}={norm}'" for pattern, norm in fix.value.items())
    return " ".join(word if word.startswith("--") else shlex.quote(word) for word in found)


def told(text: str) -> str:
    """A text of the Python API, such as a note of a report, with its options as flags."""
    return Text(text).written(written)
