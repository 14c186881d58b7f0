"""`normswap.export`: a network as a file for another runtime, which is run and compared before it is kept."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import one_of
from ..choices import EXPORTS
from ..choices import Export as ExportName
from ..comparison.outputs import Deviation, floating
from ..errors import (
    DataError,
    Fix,
    NetworkError,
    OptionError,
    OutputError,
    SelfCheckError,
    Text,
    first_line,
)
from ..files.writing import atomic, check_writable
from ..inspection.example_inputs import as_inputs, guess_inputs
from ..modules.restore import evaluating, moved, undisturbed
from ..modules.tree import device_and_dtype
from ..modules.wrappers import check_module, unwrapped
from .formats import Exported, Format, Onnx, Run, TorchScript
from .report import ExportReport

_BATCHES = (2, 3)  # another than the one exported with shows that any will do


@torch.no_grad()
def export(
    model: nn.Module,
    path: str | Path,
    *,
    to: ExportName = "onnx",
    example_inputs: Any = None,
    opset: int | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a network to a file for another runtime, and compare the file's outputs with the network's.

    to: "onnx" (a GroupNorm becomes one GroupNormalization, which takes opset 21 or later), "torchscript" (a trace), or
    "exported" (`torch.export`). The name ends in `.onnx`, `.pt` or `.pt2`.
    example_inputs: forward's arguments, a tensor or a tuple of them; their sizes are those of the file but for the
    batch, which may be of any size where the network lets it. By default random ones that the network is found to take,
    whose size is a guess: give those that you need.
    The network is left as it was; the file is written whole, or not at all.

    Needs the extra `normswap[onnx]` for ONNX. Raises OptionError, OutputError for a place that cannot be written,
    NetworkError for a network that cannot be exported, DataError where no input is known or the network does not run on
    those given, and SelfCheckError if the file's outputs differ by more than 1e-4 (relative, in float32); nothing is
    then written.
    """
    one_of("to", to, EXPORTS)
    check_module(model)
    model, path = unwrapped(model), Path(path)
    kind = _format(to, opset)
    if path.suffix.lower() != kind.suffix and not path.is_dir():
        raise OutputError(f"{path} is not a name for {to}", hint=f"Name it {path.with_suffix(kind.suffix)}.")
    check_writable(path, overwrite=overwrite)
    with moved(model, "cpu"), evaluating(model), undisturbed(model), _quiet():
        batches = _batches(model, example_inputs)
        with atomic(path) as temporary:
            dynamic, why = _written(kind, model, batches[0], temporary)
            run = kind.load(temporary)
            found = [_compared(model, run, batches[0])]
            try:
                found += [_compared(model, run, batches[1])] if dynamic else []
            except SelfCheckError as error:
                if not isinstance(kind, TorchScript):  # a trace holds what the code made of one batch
                    raise
                dynamic, why = False, f"the batch is fixed to {len(batches[0][0])}: {error.message}"
    shapes = tuple(tuple(x.shape) for x in batches[0])
    sizes = tuple(len(batch[0]) for batch in batches[: len(found)])
    furthest, largest = max(each.relative for each in found), max(each.largest for each in found)
    return ExportReport(
        path, to, shapes, dynamic, sizes, furthest, largest, kind.opset, kind.operators, (why,) * bool(why)
    )  # fmt: skip


def _format(to: str, opset: int | None) -> Format:
    if to == "onnx":
        return Onnx(opset)
    if opset is not None:
        raise OptionError(Text(Fix("opset"), f" goes with onnx, not with {to}"))
    return TorchScript() if to == "torchscript" else Exported()


def _batches(model: nn.Module, example_inputs: Any) -> list[tuple[Tensor, ...]]:
    """Inputs of two batch sizes: the exporters take a batch of one for a constant."""
    found: Any = guess_inputs(model) if example_inputs is None else as_inputs(example_inputs)
    if found is None:
        raise DataError(
            f"no input is known that {type(model).__name__} runs on", hint=Text(Fix("example_inputs"), " gives one.")
        )
    if not all(isinstance(x, Tensor) and x.dim() > 0 for x in found):
        raise NetworkError(
            f"{type(model).__name__} does not take tensors alone, and only such networks are exported",
            hint="Of a detector, export the backbone: model.backbone.",
        )
    if example_inputs is not None:
        _check_runs(model, tuple(x.detach().cpu() for x in found))
    return [tuple(_of_size(x.detach().cpu(), size) for x in found) for size in _BATCHES]


def _check_runs(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raise DataError for inputs that the network does not take: what an exporter says of that has its own words."""
    try:
        model(*(x.clone() for x in inputs))
    except Exception as error:  # a stranger's forward raises whatever it likes
        shapes = " and ".join(",".join(map(str, x.shape)) for x in inputs)
        what = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(
            f"{type(model).__name__} does not run on {shapes} ({what})",
            hint=Text(Fix("example_inputs"), " gives inputs of the shapes and types that it takes."),
        ) from error


def _of_size(x: Tensor, size: int) -> Tensor:
    """A batch of so many: the first ones of the batch, over again where it has fewer, no two alike."""
    rows = torch.cat([x] * -(-size // len(x)))[:size].clone()
    if rows.is_floating_point():
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(size))
        rows += (0.1 * noise * rows.float().std().nan_to_num(1.0)).to(rows.dtype)
    return rows


def _written(kind: Format, model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> tuple[bool, str]:
    """Whether the batch may be of any size; if not, why."""
    try:
        kind.write(model, inputs, path, dynamic=True)
    except Exception as first:  # whatever an exporter raises, first of all on networks that fix the batch
        try:
            kind.write(model, inputs, path, dynamic=False)
        except Exception as error:
            raise NetworkError(
                f"{type(model).__name__} cannot be exported ({type(error).__name__}: {first_line(error)})",
                hint=Text(Fix("to"), f" may be another: {', '.join(EXPORTS)}."),
            ) from error
        return False, f"the batch is fixed to {len(inputs[0])}: {type(first).__name__}: {first_line(first)}"
    return True, ""


def _compared(model: nn.Module, run: Run, inputs: tuple[Tensor, ...]) -> Deviation:
    """How far the file's outputs are from the network's, on one batch. Raises SelfCheckError where that is too far."""
    wanted = list(floating(model(*(x.clone() for x in inputs))).values())
    try:
        given = run(inputs)
    except Exception as error:  # of a runtime
        raise SelfCheckError(f"the file does not run on a batch of {len(inputs[0])}: {first_line(error)}") from error
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (wanted, given)]
    if shapes[0] != shapes[1]:
        raise SelfCheckError(f"the file gives outputs of shapes {shapes[1]}, the network {shapes[0]}")
    found = Deviation()
    for a, b in zip(wanted, given, strict=True):
        found.add(a, b)
    if not found.relative <= max(1e-4, 10 * torch.finfo(device_and_dtype(model)[1]).eps):
        raise SelfCheckError(f"the file's outputs differ from the network's by {found.relative:.3g}")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of what the comparison shows anyway, and log what they then raise."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
