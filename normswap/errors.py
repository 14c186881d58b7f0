"""Every error that is the caller's to mend.

Each message says where (the layer path or the file), what was found, what was expected, and the next thing to
try. The command line prints exactly these messages and exits with 1; anything else is a bug in normswap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST_NAMED = 10


def listed(summary: str, problems: Sequence[str]) -> str:
    """A message of one line for the summary and one for each of the first ten problems."""
    rest = [f"and {len(problems) - MOST_NAMED} more"] if len(problems) > MOST_NAMED else []
    return "\n  ".join([summary, *problems[:MOST_NAMED], *rest])


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for quoting it in a sentence."""
    return (str(error).strip() or "no message").splitlines()[0][:300]


class NormswapError(Exception):
    """Base of all errors that the caller can mend.

    `message` is one clear sentence; `hint`, when present, is the argument or command that fixes it.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(message if hint is None else f"{message}\n{hint}")


class OptionError(NormswapError):
    """An option, or a combination of options, that makes no sense."""


class NetworkError(OptionError):
    """A network that is not what the call takes; the options themselves are fine."""


class SourceError(NormswapError):
    """A model source that cannot be found or built."""


class WeightsError(NormswapError):
    """Weights that cannot be read, or do not fit the model."""


class CheckpointError(NormswapError):
    """A normswap file that is missing, damaged, edited, or of a newer version."""


class OutputError(NormswapError):
    """A result that cannot be written where it was asked for."""


class DataError(NormswapError):
    """Images, labels or example inputs that cannot be used."""


class SelfCheckError(NormswapError):
    """The surgery changed what the network computes; nothing was kept."""


class TrainingError(NormswapError):
    """Training that cannot go on; the network is in its last good state."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training: the network holds what it has reached; `report` says what that is, and what was saved.

    A KeyboardInterrupt, so that a script stops as it would anywhere else.
    """

    def __init__(self, report: Any) -> None:
        self.report = report
        super().__init__(str(report))


class RevertError(NormswapError):
    """The original network cannot be restored exactly."""


class PlanError(NormswapError):
    """Layers that cannot be converted as asked; `problems` holds one line each, all of them at once.

    indivisible: some of them are channels that the groups do not divide.
    """

    def __init__(
        self, summary: str, problems: Sequence[str], *, hint: str | None = None, indivisible: bool = False
    ) -> None:
        self.problems = tuple(problems)
        self.indivisible = indivisible
        super().__init__("\n".join([summary, *(f"  {problem}" for problem in problems)]), hint=hint)
