"""What is compared: one cell for each norm, number of groups and batch size, and what each came to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..arguments import whole
from ..errors import Fix, OptionError, Text
from ..files.writing import atomic
from ..norms.registry import norm_named

RESULT = "cell.json"
GROUPS = (1, 2, 4, 8, 16, 32)
FIGURES = ("accuracy", "map", "miou")
"""What is compared, by task, as `evaluate` calls it."""
Groups = Sequence[int | str]


@dataclass(frozen=True)
class Cell:
    """One network to make. groups: of norms that have any; batch_size: to train at, None to calibrate only."""

    norm: str
    groups: int | str | None = None
    batch_size: int | None = None

    @property
    def series(self) -> str:
        """The norm with its groups: what is one line of a picture."""
        return self.norm if self.groups is None else f"{self.norm}-{self.groups}"

    @property
    def name(self) -> str:
        """What its folder is called."""
        return self.series if self.batch_size is None else f"{self.series}-batch-{self.batch_size}"

    @property
    def shown(self) -> str:
        """For people."""
        groups = "" if self.groups is None else f", groups {self.groups}"
        return f"{self.norm}{groups}{'' if self.batch_size is None else f', batch {self.batch_size}'}"


def cells_of(norms: Sequence[str], groups: Groups, batch_sizes: Sequence[int]) -> list[Cell]:
    """All combinations, each once; without batch sizes, cells that are calibrated only.

    Raises OptionError for an unknown norm, one that no network can be trained with, an empty list, or a number below 1.
    """
    for name, values in (("norms", norms), ("groups", groups)):
        if isinstance(values, str) or not values:
            raise OptionError(Text(Fix(name), f" takes a list, got {values!r}"))
    for count in groups:
        if count != "auto":
            whole("groups", count)
    for size in batch_sizes:
        whole("batch_sizes", size)
    found = {
        Cell(norm, count, size): None
        for size in (*batch_sizes, *(() if batch_sizes else (None,)))
        for norm in norms
        for count in (groups if norm_named(norm).takes_groups else [None])
    }
    fused = [cell.norm for cell in found if norm_named(cell.norm).fuses]
    if fused and batch_sizes:
        raise OptionError(f"{fused[0]} leaves no norm to train", hint="Leave it out, or leave the batch sizes out.")
    return list(found)


@dataclass(frozen=True)
class CellResult:
    """What became of a cell.

    score: of the validation images, at the end; figure says what it is, `accuracy`, `map` or `miou`. best: the best
    validation on the way (trained cells). converted: right after the conversion, before any repair (calibrated cells).
    images: seen in training, or calibrated on. evaluated: validation images that the score rests on. folder: of its
    run. note: what was done otherwise than asked. error: one sentence where it failed.
    """

    cell: Cell
    score: float | None = None
    best: float | None = None
    converted: float | None = None
    loss: float | None = None
    images: int = 0
    seconds: float = 0.0
    folder: Path | None = None
    error: str = ""
    figure: str = "accuracy"
    evaluated: int = 0
    note: str = ""

    @property
    def accuracy(self) -> float | None:
        """The score, where that is an accuracy."""
        return self.score if self.figure == "accuracy" else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, in one level; the score under the name of the figure."""
        values = {**asdict(self), "folder": None if self.folder is None else str(self.folder)}
        del values["cell"], values["score"], values["figure"]
        return {**asdict(self.cell), self.figure: self.score, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CellResult:
        """The inverse of `to_dict`."""
        cell = {name: values[name] for name in ("norm", "groups", "batch_size")}
        figure = next(name for name in FIGURES if name in values)
        rest = {name: value for name, value in values.items() if name not in (*cell, figure)}
        rest["folder"] = None if rest["folder"] is None else Path(rest["folder"])
        return cls(Cell(**cell), values[figure], figure=figure, **rest)

    def keep(self, folder: Path) -> None:
        """Write it, so that it need not be made again. Raises OutputError."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / RESULT) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def kept_results(cells: Sequence[Cell], folder: Path) -> Iterator[CellResult]:
    """Those of the cells that were finished before; failed ones are to be tried again."""
    found = (_read(folder / cell.name) for cell in cells)
    wanted = set(cells)
    yield from (result for result in found if result is not None and not result.error and result.cell in wanted)


def cells_kept(folder: Path) -> list[Cell]:
    """All cells that were finished in this folder, whoever asked for them."""
    found = (_read(place.parent) for place in sorted(folder.glob(f"*/{RESULT}")))
    return [one.cell for one in found if one is not None and not one.error and (folder / one.cell.name).is_dir()]


def _read(folder: Path) -> CellResult | None:
    """What is kept in the folder of one cell; None where nothing is, or what is there cannot be read."""
    try:
        return CellResult.from_dict(json.loads((folder / RESULT).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None


def joined(asked: Sequence[Cell], kept: Sequence[Cell]) -> list[Cell]:
    """The cells asked for, and those of before: by batch size, norm and number of groups where there are such."""
    more = [cell for cell in kept if cell not in set(asked)]
    if not more:
        return list(asked)
    norms = list(dict.fromkeys(cell.norm for cell in (*asked, *more)))

    def place(cell: Cell) -> tuple[int, int, int]:
        return cell.batch_size or 0, norms.index(cell.norm), cell.groups if isinstance(cell.groups, int) else 0

    return sorted((*asked, *more), key=place)
