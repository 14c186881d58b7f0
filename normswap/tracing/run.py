"""A run of a network as data: regions of calls. `symbolic` and `recorded` make them, `feeds` reads them.

One rule rules: a wrong edge destroys a network, a missing one costs two buffers. Doubt means "not foldable".
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Call:
    """One step of a run: `kind` is module, function, input, output or parameter; `inputs` index earlier calls.

    way: what would have to be otherwise for the code to get here, such as "with raw=True"; empty for what it does as
    it stands. rank: how many dimensions its output has whatever the network is given, where the call says it.
    moves: it puts the last dimension second, whole (see `moves`). same: another call of the same layer has its readers.
    by: the module whose code ends with it, where a symbolic run went into that; empty elsewhere.
    cuts: it cuts positions away and leaves channels whole, if there are so many spatial dimensions; 0 if not.
    """

    kind: str
    target: str
    inputs: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = None
    input_shape: tuple[int, ...] | None = None
    way: str = ""
    rank: int | None = None
    moves: bool = False
    same: bool = False
    by: str = ""
    cuts: int = 0


@dataclass
class Region:
    """The calls of one run of the module at `path` (paths in calls are from the model's root).

    alike: calls that stand for one another, None for what is none: all that a module was called on which was gone into
    once, all that one returns by the ways of its code.
    """

    path: str
    calls: list[Call]
    alike: list[list[int | None]] = field(default_factory=list)


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def is_below(path: str, ancestor: str) -> bool:
    return ancestor == "" or path == ancestor or path.startswith(ancestor + ".")
