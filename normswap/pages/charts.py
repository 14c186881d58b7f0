"""Charts as inline SVG. Colours are the page's CSS variables, so that they follow it into the dark and onto paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 220
COLOURS = 6
"""How many the page has."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 26, 30  # the name of the y axis stands above its highest number
_SMALLEST = 1e-9  # what a logarithmic axis shows for 0


@dataclass(frozen=True)
class Series:
    """One line. points: (x, y), y finite. names: of the points, for who points at one; colour: 1 to `COLOURS`."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 1
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Mark:
    """A place on the x axis, and what is there."""

    x: float
    text: str


def line_chart(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    log: bool = False,
    mark: Mark | None = None,
    dots: bool = False,
    labels: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Lines over numbers; x, y: what the axes are of. An empty text where no line has a point.

    labels: places on the x axis and what stands there; by default round numbers.
    """
    points = [point for each in series for point in each.points]
    if not points:
        return Markup("")
    across = _Axis.of([px for px, _ in points], _LEFT, WIDTH - _RIGHT)
    up = _Axis.of([py for _, py in points], HEIGHT - _BOTTOM, _TOP, log=log)
    parts = [_grid(up), _x_labels(across, x, labels), _drawn("text", y, x=4, y=10, cls="axis")]
    if mark is not None:
        parts.append(_marked(across(mark.x), mark.text))
    for each in series:
        places = [(across(px), up(py)) for px, py in each.points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        parts.append(Markup('<polyline class="line c{}" points="{}"/>').format(each.colour, path))
        if dots or len(places) == 1:
            parts += [_dot(place, each, i) for i, place in enumerate(places)]
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, f"{y} over {x}")
    legend = _legend(series) if len(series) > 1 else Markup("")
    return head + Markup("").join(parts) + Markup("</svg>") + legend


def matrix_chart(names: Sequence[str], rows: Sequence[Sequence[int]]) -> Markup:
    """A confusion matrix; the darker, the larger a cell's share of its row, which is a true class."""
    left, top, cell = 96, 84, 24
    width, height = left + cell * len(names) + 34, top + cell * len(names) + 4
    parts = []
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        middle = top + cell * i + cell / 2 + 4
        parts.append(_drawn("text", _short(name), x=left - 6, y=middle, cls="axis end"))
        turned = f"rotate(-60 {left + cell * i + cell / 2 + 4} {top - 6})"
        parts.append(
            Markup('<text class="axis" x="{}" y="{}" transform="{}">{}</text>').format(
                left + cell * i + cell / 2 + 4, top - 6, turned, _short(name)
            )
        )
        for j, count in enumerate(row):
            share = count / max(sum(row), 1)
            title = f"{name}, predicted {names[j]}: {count}"
            parts.append(
                Markup(
                    '<g><title>{}</title><rect class="cell" x="{}" y="{}" width="{}" height="{}"'
                    ' fill-opacity="{:.3f}"/>'
                ).format(title, left + cell * j, top + cell * i, cell - 1, cell - 1, share)
            )
            if count:
                inside = "number over" if share > 0.5 else "number"
                parts.append(_drawn("text", str(count), x=left + cell * j + cell / 2, y=middle, cls=inside))
            parts.append(Markup("</g>"))
    head = Markup('<svg class="natural" width="{0}" viewBox="0 0 {0} {1}" role="img" aria-label="confusion matrix">')
    head = head.format(width, height)
    return head + Markup("").join(parts) + Markup("</svg>")


@dataclass(frozen=True)
class _Axis:
    """Numbers from `low` to `high` on pixels from `begin` to `end`. whole: that count something, along the x axis."""

    low: float
    high: float
    begin: float
    end: float
    log: bool
    whole: bool = False

    @classmethod
    def of(cls, values: Sequence[float], begin: float, end: float, *, log: bool = False) -> _Axis:
        if log:
            exponents = [math.log10(max(value, _SMALLEST)) for value in values]
            low, high = math.floor(min(exponents)), math.ceil(max(exponents))
            return cls(low, max(high, low + 1), begin, end, True)
        least, most = min(values), max(values)
        if begin < end:
            return cls(least, most, begin, end, False, all(value == round(value) for value in values))
        room = (most - least) * 0.05 or abs(most) * 0.1 or 1.0
        bottom = least - room
        return cls(bottom if least < 0 else max(bottom, 0.0), most + room, begin, end, False)

    def __call__(self, value: float) -> float:
        at = math.log10(max(value, _SMALLEST)) if self.log else value
        return self.begin + (self.end - self.begin) * (at - self.low) / ((self.high - self.low) or 1.0)

    def ticks(self) -> list[float]:
        """Round numbers, four or so."""
        if self.log:
            step = max(1, round((self.high - self.low) / 4))
            return [10.0**n for n in range(int(self.low), int(self.high) + 1, step)]
        rough = (self.high - self.low) / 4 or 1.0
        unit = 10 ** math.floor(math.log10(rough))
        step = min((unit * n for n in (1, 2, 5, 10)), key=lambda size: abs(size - rough))
        step = max(step, 1) if self.whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def _grid(up: _Axis) -> Markup:
    lines = Markup("")
    for value in up.ticks():
        y = up(value)
        lines += Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            _LEFT, WIDTH - _RIGHT, y, y
        )
        lines += _drawn("text", f"{value:.3g}", x=_LEFT - 6, y=y + 4, cls="axis end")
    return lines


def _x_labels(across: _Axis, name: str, given: Sequence[tuple[float, str]]) -> Markup:
    labels = Markup("")
    for value, text in given or [(tick, f"{tick:g}") for tick in across.ticks()]:
        labels += _drawn("text", text, x=across(value), y=HEIGHT - 16, cls="axis middle")
    return labels + _drawn("text", name, x=WIDTH - _RIGHT, y=HEIGHT - 3, cls="axis end")


def _marked(x: float, text: str) -> Markup:
    right = x > WIDTH / 2
    line = Markup('<line class="mark" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(x, _TOP, HEIGHT - _BOTTOM)
    return line + _drawn("text", text, x=x - 5 if right else x + 5, y=_TOP + 10, cls="marked" + " end" * right)


def _dot(place: tuple[float, float], series: Series, number: int) -> Markup:
    said = f"{series.names[number] if series.names else series.name}: {series.points[number][1]:.3g}"
    return Markup('<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="2.5"><title>{}</title></circle>').format(
        series.colour, *place, said
    )


def _legend(series: Sequence[Series]) -> Markup:
    items = (Markup('<span class="key c{}">{}</span>').format(each.colour, each.name) for each in series)
    return Markup('<p class="legend">{}</p>').format(Markup("").join(items))


def _drawn(tag: str, text: str, *, x: float, y: float, cls: str) -> Markup:
    return Markup('<{0} class="{1}" x="{2:.1f}" y="{3:.1f}">{4}</{0}>').format(Markup(tag), cls, x, y, escape(text))


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"
