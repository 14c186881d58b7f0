"""What `export` reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..display.overview import ReportInNotebook


@dataclass(frozen=True)
class ExportReport(ReportInNotebook):
    """The result of `export`.

    shapes: of the inputs; dynamic: whether the first dimension, the batch, may be of any size. error, max_abs: how far
    the file's outputs are from the network's, as in `Difference`, over `batches` of these sizes. opset: of ONNX, and
    operators: how often each of its normalizations is in the file. notes: what a user should know.
    """

    path: Path
    to: str
    shapes: tuple[tuple[int, ...], ...]
    dynamic: bool
    batches: tuple[int, ...]
    error: float
    max_abs: float
    opset: int | None = None
    operators: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def inputs(self) -> str:
        """`Nx3x224x224`, of each input."""
        return ", ".join("x".join(map(str, ("N", *s[1:]) if self.dynamic else s)) for s in self.shapes)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "path": str(self.path), "notes": list(self.notes)}

    def __str__(self) -> str:
        found = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        lines = [f"{self.path}: {self.to}, inputs {self.inputs}" + f"; {found}" * bool(found)]
        return "\n".join([*lines, f"relative error {self.error:.3g}", *self.notes])
