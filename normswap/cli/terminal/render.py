"""Tables and text with rich: coloured on a terminal, plain and unwrapped elsewhere. Nothing else imports rich.

All text goes through `rich.text.Text`, never through markup, so a layer may be called `[red]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ...display.printable import printable
from .streams import is_terminal

Cell = str | tuple[str, str]
_UNWRAPPED = 100_000
STYLES = {"good": "green", "bad": "yellow", "dim": "dim", "strong": "bold", "path": "cyan", "head": "bold"}


class Page:
    """What a command's result is put on, top to bottom."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.terminal = is_terminal(stream)
        self._console = Console(
            file=stream, markup=False, highlight=False, emoji=False, width=None if self.terminal else _UNWRAPPED
        )

    @property
    def width(self) -> int:
        """Columns there are; very many where it is no terminal."""
        return self._console.width

    def line(self, *parts: Cell) -> None:
        """One line; a part may be a pair of text and style."""
        self._print(_text(parts))

    def gap(self) -> None:
        """An empty line."""
        self._print(Text())

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, of_all: str = "all") -> None:
        """A table. A column whose title begins with `>` is for numbers: set to the right, never wrapped.

        On a terminal that is too narrow, columns that say the same in every row go below the table, as `of_all: ...`.
        """
        titles, cells = list(columns), [list(row) for row in rows]
        table, alike = self._grid(titles, cells), []
        while self.terminal and self._width(table) > self._console.width:
            place = next((i for i in range(1, len(titles)) if len({_words(row[i]) for row in cells}) == 1), None)
            if place is None:
                break
            alike.append(f"{titles.pop(place).lstrip('>')} {_words(cells[0][place])}")
            cells = [row[:place] + row[place + 1 :] for row in cells]
            table = self._grid(titles, cells)
        self._print(table)
        if alike:
            self.line((f"{of_all}: {', '.join(alike)}", "dim"))

    def _width(self, table: Table) -> int:
        return Measurement.get(self._console, self._console.options.update(max_width=_UNWRAPPED), table).maximum

    def _grid(self, titles: Sequence[str], cells: Iterable[Sequence[Cell]]) -> Table:
        style = box.SIMPLE_HEAD if self.terminal else None
        table = Table(
            box=style, pad_edge=False, show_edge=False, collapse_padding=self.terminal, header_style=STYLES["head"]
        )
        for title in titles:
            if title.startswith(">"):
                table.add_column(Text(title[1:]), justify="right", no_wrap=True)
            else:
                table.add_column(Text(title), overflow="fold")
        for row in cells:
            table.add_row(*(_text([cell]) for cell in row))
        return table

    def facts(self, *facts: tuple[str, str], indent: int = 2) -> None:
        """Labelled values, one below the other."""
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style=STYLES["dim"], no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in facts:
            table.add_row(Text(label), _text([value]))
        self._print(Padding(table, (0, 0, 0, indent), expand=False))

    def skipped(self, names: Iterable[str]) -> None:
        """Images that could not be read."""
        for name in names:
            self.line(("skipped: ", "bad"), name)

    def block(self, text: str, indent: int = 2) -> None:
        """An indented paragraph."""
        self._print(Padding(_text([text]), (0, 0, 0, indent), expand=False))

    def _print(self, what: RenderableType) -> None:
        if self.terminal:
            self._console.print(what)
            return
        with self._console.capture() as captured:
            self._console.print(what)
        self._stream.write("\n".join(line.rstrip(" ") for line in captured.get().split("\n")))


def _words(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _text(parts: Iterable[Cell]) -> Text:
    text = Text()
    for part in parts:
        words, style = (part, "") if isinstance(part, str) else part
        text.append(printable(words), STYLES.get(style, style))
    return text


def size(count: int) -> str:
    """Bytes for a reader: `98.0 MiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
