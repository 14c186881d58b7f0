"""What a command did."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ran:
    """Exit code, and all that went to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Ran]

# The classes of the `images` fixture, as red, green and blue.
COLOURS = {"blue": (10, 20, 240), "green": (20, 230, 30), "grey": (128, 128, 128), "red": (250, 20, 10)}
