"""Draws the map of docs/architecture.md from the code's own imports, and counts the house.

    python docs/_map.py            writes docs/assets/architecture.svg
    python docs/_map.py --figures  prints files, floors, arrows, and the length of functions

Floors come from the table in docs/architecture.md; a test holds the imports to them.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "normswap"
TARGET = ROOT / "docs" / "assets" / "architecture.svg"
WIDTH, ROOM, GAP, LEFT = 940, 54, 40, 96


def floors() -> list[list[str]]:
    """Rooms by floor, from the lowest."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition("\n## Floors\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in text.splitlines() if re.match(r"\| *\d", line)]
    return [re.findall(r"`([^`/]+)/?`", row) for row in rows]


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """The rooms that a file imports from, its own among them."""
    here = ["normswap", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for name in [[*base, alias.name] for alias in node.names] if len(base) == 1 else [base]:
                known = (PACKAGE / name[1]).is_dir() or (PACKAGE / f"{name[1]}.py").is_file()
                found.add(name[1] if known else "__init__")
    return found


def arrows() -> dict[tuple[str, str], int]:
    """(room, room that it imports from): by how many files."""
    counts: dict[tuple[str, str], int] = {}
    for path in files():
        for other in imports(path) - {room_of(path)}:
            key = room_of(path), other
            counts[key] = counts.get(key, 0) + 1
    return counts


def drawn() -> str:
    """The map as SVG: floors from the bottom up, a room's files and lines, an arrow for every import."""
    house = floors()
    size = {room: [0, 0] for floor in house for room in floor}
    for path in files():
        size[room_of(path)][0] += 1
        size[room_of(path)][1] += len(path.read_text("utf-8").splitlines())
    place: dict[str, tuple[float, float, float]] = {}
    height = len(house) * (ROOM + GAP) + 20
    parts = []
    for number, floor in enumerate(house):
        top = height - (number + 1) * (ROOM + GAP) + 10
        wide = min(190.0, (WIDTH - LEFT - 20 - 14 * (len(floor) - 1)) / len(floor))
        start = LEFT + (WIDTH - LEFT - 20 - len(floor) * wide - 14 * (len(floor) - 1)) / 2
        parts.append(f'<text class="floor" x="14" y="{top + ROOM / 2 + 4:.0f}">floor {number}</text>')
        for i, room in enumerate(floor):
            place[room] = (start + i * (wide + 14), top, wide)
    lines = []
    for (above, below), count in sorted(arrows().items()):
        (x1, y1, w1), (x2, y2, w2) = place[above], place[below]
        a, b = x1 + w1 / 2, x2 + w2 / 2
        bend = (y2 - y1 - ROOM) / 2
        path = f"M{a:.0f} {y1 + ROOM:.0f} C{a:.0f} {y1 + ROOM + bend:.0f} {b:.0f} {y2 - bend:.0f} {b:.0f} {y2 - 3:.0f}"
        lines.append(f'<path class="arrow" stroke-width="{min(3.0, 0.6 + 0.12 * count):.1f}" d="{path}"/>')
    for room, (x, y, wide) in place.items():
        count, total = size[room]
        title = "normswap" if room == "__init__" else room
        what = f"{total} lines" if count == 1 else f"{count} files, {total} lines"
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{wide:.0f}" height="{ROOM}" rx="6"/>')
        parts.append(f'<text class="room" x="{x + wide / 2:.0f}" y="{y + 23:.0f}">{title}</text>')
        parts.append(f'<text class="size" x="{x + wide / 2:.0f}" y="{y + 41:.0f}">{what}</text>')
    style = (
        "text{font-family:sans-serif;fill:#223}.floor{font-size:12px;fill:#889}.room{font-size:14px;font-weight:600;"
        "text-anchor:middle}.size{font-size:10.5px;text-anchor:middle;fill:#667}rect{fill:#eef2fb;stroke:#7d8fc4}"
        ".arrow{fill:none;stroke:#b9c3de;stroke-opacity:.55}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Map">'
    background = f'<rect style="fill:#fff;stroke:none" width="{WIDTH}" height="{height}"/>'
    return "\n".join([head, f"<style>{style}</style>", background, *lines, *parts, "</svg>", ""])


def figures() -> str:
    """What the house counts to."""
    paths = files()
    bodies = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
                bodies.append((lines, f"{path.relative_to(ROOT)}:{node.name}"))
    between = arrows()
    inner = sum(len(modules(path)) for path in paths)
    longest = max(bodies)
    return "\n".join(
        [
            f"files {len(paths)}, of them directly in the package {len(list(PACKAGE.glob('*.py')))}",
            f"lines {sum(len(p.read_text('utf-8').splitlines()) for p in paths)}",
            f"floors {len(floors())}, rooms {sum(map(len, floors()))}, arrows between rooms {len(between)}",
            f"imports from file to file {inner}",
            f"functions {len(bodies)}, median body {statistics.median(n for n, _ in bodies):g} lines, "
            f"above 30 lines {sum(n > 30 for n, _ in bodies)}, longest {longest[0]} ({longest[1]})",
        ]
    )


def modules(path: Path) -> set[str]:
    """The files that a file imports from."""
    here = ["normswap", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                full = [*base[1:], alias.name]
                whole = PACKAGE.joinpath(*full)
                found.add("/".join(full if whole.with_suffix(".py").is_file() or whole.is_dir() else base[1:]))
    return found


if __name__ == "__main__":
    if "--figures" in sys.argv:
        print(figures())
    else:
        TARGET.write_text(drawn(), "utf-8")
        print(TARGET)
