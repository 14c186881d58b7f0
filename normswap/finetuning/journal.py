"""What a run writes down as it goes: metrics.jsonl, curves.png, TensorBoard's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..writing import atomic

METRICS, CURVES = "metrics.jsonl", "curves.png"


class Journal:
    """Figures of a run, one JSON object a line: `{"step": 40, "epoch": 0.4, "loss": 0.7, ...}`.

    Lines with `val_...` come from a validation. A resumed run first drops what lies beyond its step, so that the file
    ends up as that of a run without interruption. With no folder, nothing is written.
    """

    def __init__(self, folder: Path | None, *, step: int = 0, tensorboard: bool = False) -> None:
        self.lines: list[dict[str, Any]] = []
        self._path = None if folder is None else folder / METRICS
        self._board: Any = None
        if self._path is not None:
            if step and self._path.exists():
                self.lines = [line for line in _read(self._path) if line["step"] <= step]
            with atomic(self._path) as temporary:
                temporary.write_text("".join(_text(line) for line in self.lines))
        if tensorboard and folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, line: dict[str, Any]) -> None:
        """Add figures, rounded to what they mean."""
        line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
        self.lines.append(line)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(_text(line))
        if self._board is not None:
            for name, value in line.items():
                if name not in ("step", "epoch"):
                    self._board.add_scalar(name.replace("val_", "validation/"), value, line["step"])

    def close(self) -> None:
        """Let TensorBoard's file be complete."""
        if self._board is not None:
            self._board.close()

    def draw(self, figure: str, title: str) -> bool:
        """Write curves.png: loss and `figure`, in training and in validation. False without matplotlib or a folder."""
        if self._path is None or not self.lines:
            return False
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            return False
        canvas = Figure(figsize=(10, 6.4), layout="constrained")
        FigureCanvasAgg(canvas)
        canvas.suptitle(title)
        panels = canvas.subplots(2, 2, sharex=True)
        for row, name in enumerate(("loss", figure)):
            for column, prefix in enumerate(("", "val_")):
                _panel(panels[row][column], self.lines, prefix + name, name, "validation" if column else "training")
        for panel in panels[1]:
            panel.set_xlabel("epoch")
        with atomic(self._path.with_name(CURVES)) as temporary:
            canvas.savefig(temporary, format="png", dpi=110)
        return True


def _panel(panel: Any, lines: list[dict[str, Any]], key: str, name: str, where: str) -> None:
    points = [(line["epoch"], line[key]) for line in lines if key in line]
    panel.set_title(f"{where} {name.replace('_', ' ')}", fontsize=10)
    panel.grid(alpha=0.3)
    if not points:
        panel.text(0.5, 0.5, "none", ha="center", va="center", transform=panel.transAxes, color="grey")
        return
    x, y = zip(*points, strict=True)
    validation = where == "validation"
    panel.plot(x, y, color="tab:orange" if validation else "tab:blue", marker="o" if validation else None, lw=1.5)
    if len(points) < 30:
        panel.annotate(f"{y[-1]:.3g}", (x[-1], y[-1]), textcoords="offset points", xytext=(4, 4), fontsize=8)


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines; a last one cut short by a crash is left out."""
    found = []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            break
    return found
