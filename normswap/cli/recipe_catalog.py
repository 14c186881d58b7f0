"""The recipes that come with the package: scripts of one file each, to run as they are or to copy and change."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import NormswapError, OptionError, did_you_mean

_HERE = Path(__file__).parents[1]
FOLDERS = (_HERE / "_recipes", _HERE.parent / "recipes")
"""Where they are: in a wheel within the package, in a checkout beside it."""
_FIELD = re.compile(r"^(Goal|Command|Time|Expected): +", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """One recipe, as the docstring at its top describes it: what it is for, how to run it, how long, what it prints."""

    name: str
    file: Path
    title: str
    goal: str
    command: str
    time: str
    expected: str

    @property
    def gist(self) -> str:
        """The first part of the goal, for one line of a list."""
        return self.goal.partition("; ")[0]

    @classmethod
    def read(cls, file: Path) -> Recipe:
        """Raises OptionError for a file whose docstring lacks a part."""
        text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
        title, *parts = _FIELD.split(text)
        found = {key.lower(): " ".join(part.split()) for key, part in zip(parts[::2], parts[1::2], strict=True)}
        missing = sorted({"goal", "command", "time", "expected"} - set(found))
        if missing or not title.strip():
            raise OptionError(f"{file} does not say in its docstring: {', '.join(missing) or 'what it does'}")
        return cls(file.stem, file, " ".join(title.split()), **found)

    def to_dict(self) -> dict[str, str]:
        """JSON values."""
        return {key: str(value) for key, value in vars(self).items()}


def recipes() -> tuple[Recipe, ...]:
    """All of them, by name. Raises OptionError when they were not installed."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
    if folder is None:
        raise NormswapError(f"there are no recipes in {FOLDERS[0]}", hint="Install normswap again, from its wheel.")
    return tuple(Recipe.read(file) for file in sorted(folder.glob("[a-z]*.py")))


def recipe(name: str) -> Recipe:
    """The recipe of that name, `.py` or not. Raises OptionError, with near matches, for an unknown one."""
    known = {found.name: found for found in recipes()}
    wanted = name.removesuffix(".py")
    if wanted not in known:
        raise OptionError(
            f"unknown recipe {name!r}; there are {', '.join(known)}",
            hint=did_you_mean(wanted, known),
        )
    return known[wanted]
