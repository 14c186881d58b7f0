"""Every error that is the caller's to mend.

Each message says where (the layer path or the file), what was found, what was expected, and the next thing to
try. Options in it are data, which Python and the command line each write their own way.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_NAMED = 10


class _Unset:
    """Nothing given; there is one, in every process that it is sent to."""

    def __reduce__(self) -> str:
        return "UNSET"


UNSET: Any = _Unset()


@dataclass(frozen=True)
class Fix:
    """An option as data: `groups=32` as text is Python's, the command line makes `--groups 32` of it.

    option: as Python names it. value: what to give it; without one, the option is only named.
    """

    option: str
    value: Any = UNSET

    def __str__(self) -> str:
        return self.option if self.value is UNSET else f"{self.option}={_literal(self.value)}"


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


class Text(str):
    """A text with options in it: a string as Python says it, and `parts` for whoever names options in another way."""

    parts: tuple[str | Fix, ...]

    def __new__(cls, *parts: str | Fix) -> Text:
        flat = [piece for part in parts for piece in (part.parts if isinstance(part, Text) else (part,))]
        self = super().__new__(cls, "".join(map(str, flat)))
        self.parts = tuple(flat)
        return self

    @classmethod
    def joined(cls, between: str, texts: Iterable[str]) -> Text:
        """`between.join(texts)` that keeps the options as data."""
        parts = [part for text in texts for part in (between, text)]
        return cls(*parts[1:])

    @property
    def fixes(self) -> tuple[Fix, ...]:
        """The options in it."""
        return tuple(part for part in self.parts if isinstance(part, Fix))

    def lines(self) -> list[Text]:
        """As `splitlines`, each with its options."""
        found: list[list[str | Fix]] = [[]]
        for part in self.parts:
            first, *more = part.split("\n") if isinstance(part, str) else (part,)
            found[-1].append(first)
            found += [[line] for line in more]
        return [Text(*line) for line in found]

    def written(self, write: Callable[[Fix], str | None]) -> str:
        """With each option as `write` writes it; where that is None, as Python does."""
        return "".join(part if isinstance(part, str) else write(part) or str(part) for part in self.parts)


def did_you_mean(word: str, known: Iterable[str], *, usual: Mapping[str, str] | None = None) -> str | None:
    """A hint with the names nearest to a word, whatever its case; None when none is near.

    usual: what people call them, in lower case without hyphens and underscores.
    """
    names = list(known)
    bare = word.lower().replace("_", "").replace("-", "")
    near = [(usual or {})[bare]] if bare in (usual or {}) else []
    near = near or [name for name in names if name.lower() == word.lower()]
    if not near:
        cutoff = 0.6 if len(word) > 4 else 0.5  # of two letters, one may be wrong
        by_lower = {name.lower(): name for name in reversed(names)}
        near = [by_lower[name] for name in difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=cutoff)]
    return f"Did you mean {' or '.join(near)}?" if near else None


def listed(summary: str, problems: Sequence[str]) -> str:
    """A message of one line for the summary and one for each of the first ten problems."""
    rest = [f"and {len(problems) - MOST_NAMED} more"] if len(problems) > MOST_NAMED else []
    return "\n  ".join([summary, *problems[:MOST_NAMED], *rest])


def plainly(value: Any) -> str:
    """A value for a sentence: `none`, `on`, `off`, else as Python writes it."""
    if value is None:
        return "none"
    return repr(value) if not isinstance(value, bool) else "on" if value else "off"


def plural(count: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for quoting it in a sentence: without the colours that some libraries add."""
    return (_COLOURS.sub("", str(error)).strip() or "no message").splitlines()[0][:300]


_COLOURS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # escape sequences of ECMA-48 that begin with CSI


class NormswapError(Exception):
    """Base of all errors that the caller can mend.

    `message` is one clear sentence; `hint`, when present, is the argument or command that fixes it. Both are strings;
    those that name options are `Text`.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(message if hint is None else f"{message}\n{hint}")

    def written(self, write: Callable[[Fix], str | None]) -> str:
        """Message and hint with the options as `write` writes them.

        A line of the hint with an option that it does not know (None) is left out: it is no way out there.
        """
        hints = Text(self.hint).lines() if self.hint else ()
        possible = [line for line in hints if all(write(fix) is not None for fix in line.fixes)]
        return "\n".join(text.written(write) for text in (Text(self.message), *possible))


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
    """Layers that cannot be converted as asked; `problems` holds one line each, all of them at once, below `summary`.

    indivisible: some of them are channels that the groups do not divide.
    """

    def __init__(
        self, summary: str, problems: Sequence[str], *, hint: str | None = None, indivisible: bool = False
    ) -> None:
        self.summary = summary
        self.problems = tuple(problems)
        self.indivisible = indivisible
        super().__init__(Text.joined("\n", [summary, *(Text("  ", problem) for problem in problems)]), hint=hint)
