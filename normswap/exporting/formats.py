"""One class a format: a network is written to a file, and the file is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..comparison.outputs import floating
from ..errors import NormswapError

Run = Callable[[tuple[Tensor, ...]], list[Tensor]]
"""Inputs -> the floating tensors of the output."""


class Format(Protocol):
    """What a file may be."""

    suffix: ClassVar[str]
    opset: int | None
    operators: dict[str, int]

    def write(self, model: nn.Module, inputs: tuple[Tensor, ...], path: Path, *, dynamic: bool) -> None:
        """dynamic: the first dimension of every input may be of any size. Raises whatever the exporter does."""

    def load(self, path: Path) -> Run:
        """What runs the file."""


class Onnx:
    """ONNX by torch's exporter, with one operator for each GroupNorm: that takes opset 21."""

    suffix: ClassVar[str] = ".onnx"

    def __init__(self, opset: int | None = None) -> None:
        self.opset: int | None = opset or 21
        self.operators: dict[str, int] = {}
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise NormswapError(
                f"ONNX needs onnx, onnxscript and onnxruntime, and {error.name} is not installed",
                hint="pip install 'normswap[onnx]'",
            ) from error

    def write(self, model: nn.Module, inputs: tuple[Tensor, ...], path: Path, *, dynamic: bool) -> None:
        program: Any = torch.onnx.export(
            model, inputs, dynamo=True, opset_version=self.opset, verbose=False, dynamic_shapes=_shapes(inputs, dynamic)
        )
        names = (node.op_type for node in program.model.graph)
        self.operators = dict(Counter(name for name in names if name.endswith("Normalization")))
        program.save(str(path), external_data=False)

    def load(self, path: Path) -> Run:
        import onnxruntime

        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), quiet, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
            given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
            return [t for out in session.run(None, given) if (t := torch.from_numpy(out)).is_floating_point()]

        return run


class TorchScript:
    """A trace, which torch itself advises against by now, for runtimes that take nothing else."""

    suffix: ClassVar[str] = ".pt"

    def __init__(self) -> None:
        self.opset: int | None = None
        self.operators: dict[str, int] = {}

    def write(self, model: nn.Module, inputs: tuple[Tensor, ...], path: Path, *, dynamic: bool) -> None:
        traced: Any = torch.jit.trace(model, inputs, strict=False, check_trace=False)
        traced.save(str(path))

    def load(self, path: Path) -> Run:
        return _running(torch.jit.load(str(path), map_location="cpu"))


class Exported:
    """A program of `torch.export`."""

    suffix: ClassVar[str] = ".pt2"

    def __init__(self) -> None:
        self.opset: int | None = None
        self.operators: dict[str, int] = {}

    def write(self, model: nn.Module, inputs: tuple[Tensor, ...], path: Path, *, dynamic: bool) -> None:
        program = torch.export.export(model, inputs, dynamic_shapes=_shapes(inputs, dynamic))
        with path.open("wb") as file:  # by its name, torch would refuse some
            torch.export.save(program, file)

    def load(self, path: Path) -> Run:
        with path.open("rb") as file:
            return _running(torch.export.load(file).module())


def _running(module: Callable[..., Any]) -> Run:
    return lambda inputs: list(floating(module(*inputs)).values())


def _shapes(inputs: tuple[Tensor, ...], dynamic: bool) -> Any:
    return tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs) if dynamic else None
