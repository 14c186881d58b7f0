"""The layers of a network, and what a plan does to them, as tables of few rows: in text, in HTML, for commands.

A cell is a text, or a text with a style (see `cli.terminal.render`). A title that begins with `>` is of numbers.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import plural
from ..modules.path_ranges import ROOT, PathRange, collapse, local_names

Cell = str | tuple[str, str]

CARRIED = {
    "fold": ("folded", "good"),
    "prescale": ("prescaled", "bad"),
    "fuse": ("fused", "good"),
    "affine": ("scale and shift left", "bad"),
    "exact": ("exact", "good"),
    "centre": ("exact, centred", "good"),
    "estimate": ("from images", ""),
    "absorb": ("from images, fused", ""),
    "copy": ("γ and β copied", ""),
    "reset": ("reset", ""),
}
"""What `Step.transfer` is called."""


@dataclass(frozen=True)
class Table:
    """Titles and rows of cells."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __str__(self) -> str:
        texts = [[title.lstrip(">") for title in self.columns], *([_words(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        sides = [str.rjust if title.startswith(">") else str.ljust for title in self.columns]
        lines = (
            "  ".join(side(t, width) for side, t, width in zip(sides, row, widths, strict=True)).rstrip()
            for row in texts
        )
        return "\n".join(lines)

    def to_html(self) -> str:
        """A `<table>`; all text is escaped."""
        head = "".join(f"<th>{html.escape(title.lstrip('>'))}</th>" for title in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_words(cell))}</td>" for cell in row) + "</tr>" for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class ReportInNotebook:
    """A report shows its text in a notebook, and below it its tables and pictures."""

    def _repr_html_(self) -> str:
        parts = [f"<pre>{html.escape(str(self))}</pre>", *(table.to_html() for table in self._tables())]
        return "".join([*parts, *(_inline(*each) for each in self._pictures())])

    def _tables(self) -> Iterable[Table]:
        return ()

    def _pictures(self) -> Iterable[tuple[str, Path | bytes | None]]:
        """What is to be seen, and a PNG, or the file with it, if there is one."""
        return ()


def _inline(alt: str, picture: Path | bytes | None) -> str:
    if isinstance(picture, Path):
        picture = picture.read_bytes() if picture.is_file() else None
    if picture is None:
        return ""
    data = base64.b64encode(picture).decode("ascii")
    return f'<img alt="{html.escape(alt)}" style="max-width: 100%" src="data:image/png;base64,{data}">'


def layers_table(layers: Sequence[Any], *, rule: Mapping[str, str] | None = None, show_all: bool = False) -> Table:
    """Rows of like layers (`inventory.Layer`), or one for each. rule: what a rule makes of each, by path."""
    roles = len({layer.role for layer in layers}) > 1
    given = {} if rule is None else rule
    keys = [lambda x, key=key: (given.get(x.path), *key(x)) for key in (_key, _loose_key)]
    runs = collapse(layers, lambda x: x.path, *keys, together=not show_all)
    columns = ("layer", *(["role"] if roles else []), *([] if rule is None else ["rule"]),
               *([] if show_all else [">layers"]), "type", ">channels", ">eps", "affine", "mode", "fed by",
               "foldable")  # fmt: skip
    rows = (_row(run, show_all, roles, [] if rule is None else [given.get(run.items[0].path, "")]) for run in runs)
    return Table(columns, tuple(tuple(row) for row in rows))


def _key(layer: Any) -> tuple[Any, ...]:
    return (layer.state.channels, *_loose_key(layer))


def _loose_key(layer: Any) -> tuple[Any, ...]:
    """What the layers of one row share; channels may then be a range."""
    state = layer.state
    fixed = (layer.role, layer.class_name, state.eps, state.affine, layer.mode, _grouped(layer))
    return (*fixed, layer.feed.kind, layer.feed.foldable, local_names(layer.feed.reason, layer.path))


def _row(run: PathRange[Any], show_all: bool, roles: bool, rule: Sequence[str]) -> list[Cell]:
    first = run.items[0]
    fed_by = first.feed.kind.replace("_", " ")
    if show_all and first.feed.producers:
        fed_by += " " + ", ".join(first.feed.producers)
    feed = first.feed
    told = feed.kind not in ("other", "linear") and feed.reason.startswith("its input is")  # by what feeds it
    why = "" if told or feed.kind == "unknown" else f": {local_names(feed.reason, first.path)}"
    fold = ("yes", "good") if first.feed.foldable else (f"no{why}", "bad")
    also = f" = {', '.join(first.aliases)}" if show_all and first.aliases else ""
    return [
        ((run.name or ROOT) + also, "path"),
        *([first.role] if roles else []),
        *rule,
        *([] if show_all else [str(len(run.items))]),
        first.class_name + _grouped(first),
        number_range(x.state.channels for x in run.items),
        f"{first.state.eps:g}",
        "yes" if first.state.affine else "no",
        first.mode,
        fed_by,
        fold if first.state.has_statistics else "no statistics",
    ]


def _grouped(layer: Any) -> str:
    return f" ({plural(layer.state.num_groups, 'group')})" if layer.state.num_groups else ""


def steps_table(steps: Sequence[Any]) -> Table:
    """Rows of like steps (`planning.Step`)."""
    runs = collapse(steps, lambda s: s.path, _step_key, _loose_step_key)
    rows = []
    for run in runs:
        first = run.items[0]
        words, style = CARRIED[first.transfer]
        cells: tuple[Cell, ...] = (
            (run.name or ROOT, "path"),
            str(len(run.items)),
            number_range(s.channels for s in run.items),
            first.source_class,
            target_told(run.items),
            (words + also_told(first), style),
        )
        rows.append(cells)
    return Table(("layer", ">layers", ">channels", "was", "becomes", "statistics"), tuple(rows))


def also_told(step: Any) -> str:
    """What a step does beside what its transfer says."""
    told = {"padding left out": step.padded, "γ and β in readers": step.readers, "γ = 0": step.zero_init}
    return "".join(f", {words}" for words, so in told.items() if so)


def kept_table(kept: Sequence[Any]) -> Table:
    """Rows of layers (`planning.Kept`) that stay for the same reason."""
    runs = collapse(kept, lambda k: k.path, lambda k: (k.norm, k.reason))
    rows = (((r.name or ROOT, "path"), str(len(r.items)), r.items[0].norm, r.items[0].reason) for r in runs)
    return Table(("layer", ">layers", "norm", "why"), tuple(rows))


def _step_key(step: Any) -> tuple[Hashable, ...]:
    return (step.channels, step.options, *_loose_step_key(step))


def _loose_step_key(step: Any) -> tuple[Hashable, ...]:
    """What the layers of one row share; channels and groups may then differ."""
    return (
        step.source_class,
        step.target,
        step.options.eps,
        step.transfer,
        step.note == "",
        step.zero_init,
        step.padded,
        bool(step.readers),
    )


def target_told(steps: Sequence[Any]) -> str:
    """The new norm with its options, as `gn (32 groups)`, or `gn (16 per group)` where that is what stays the same."""
    first = steps[0]
    options = {k: v for k, v in asdict(first.options).items() if v is not None}
    parts = []
    if options.pop("num_groups", None) is not None:
        parts.append(_groups([(step.channels, asdict(step.options)["num_groups"]) for step in steps]))
    parts += [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in options.items()]
    return first.target + (f" ({', '.join(parts)})" if parts else "")


def _groups(pairs: Sequence[tuple[int, int]]) -> str:
    numbers, sizes = {groups for _, groups in pairs}, {channels // groups for channels, groups in pairs}
    if len(numbers) > 1 and len(sizes) == 1:
        return f"{sizes.pop()} per group"
    return f"{number_range(numbers)} group{'s' * (numbers != {1})}"


def number_range(values: Iterable[int]) -> str:
    """`64`, or `64-1760` where they differ."""
    low, high = min(values := list(values)), max(values)
    return str(low) if low == high else f"{low}-{high}"


def counted(items: Iterable[Any], words: Callable[[Any], str]) -> str:
    """`53 bn, 1 gn`: how many items there are of each, in the order of the first."""
    counts: dict[str, int] = {}
    for item in items:
        counts[words(item)] = counts.get(words(item), 0) + 1
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def _words(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]
