"""SOURCE on the command line -> a network: one that is built, or one from a file that normswap wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from . import options
from .output import Output

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..sources import Source


@dataclass(frozen=True)
class Wanted:
    """What the user said about one network."""

    text: str
    weights: str | None = None
    args: tuple[str, ...] = ()
    trust_pickle: bool = False
    trust_code: bool = False
    allow_nonfinite: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Origin:
    """Where a network comes from: `source` builds it; `file`, which normswap wrote, holds its weights and the swap."""

    source: Source | None
    file: Path | None = None
    weights: str | None = None

    def __str__(self) -> str:
        return str(self.file or self.source)

    @property
    def stem(self) -> str:
        """What results are named after."""
        return self.source.stem if self.source is not None else self.file.stem if self.file is not None else "model"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "file": None if self.file is None else str(self.file),
            "source": None if self.source is None else self.source.to_dict(),
            "weights": self.weights,
        }


def converted_file(text: str) -> Path | None:
    """The path, if SOURCE names an existing file that is, by its name or its content, one that normswap wrote."""
    path = Path(text)
    if not path.is_file():
        return None
    if path.suffix == ".safetensors":
        return path
    from ..checkpoint import is_ours

    return path if is_ours(path) else None


def locate(ctx: typer.Context, wanted: Wanted, *, default_weights: str = "DEFAULT") -> Origin:
    """Find out what SOURCE names, without building it.

    Raises NormswapError, or a usage error for options that do not go with a converted file.
    """
    from .. import checkpoint, sources

    file = converted_file(wanted.text)
    if file is None:
        source = sources.parse(wanted.text, sources.parse_args(list(wanted.args)))
        return Origin(source, weights=wanted.weights or default_weights)
    for flag, given in (("--weights", wanted.weights), ("--arg", wanted.args)):
        if given:
            raise options.usage(ctx, f"{flag} goes with a network to build; {file} brings its own weights")
    values = checkpoint.read_manifest(file)["source"]
    return Origin(None if values is None else sources.Source.from_dict(values), file)


def open_network(origin: Origin, wanted: Wanted, out: Output, *, values: bool = True) -> tuple[nn.Module, Origin]:
    """Build or load it. Returns it, and the origin with what building has shown.

    values=False leaves weights out that would have to be downloaded; a local checkpoint is read all the same.
    """
    if origin.file is not None:
        out.step(f"loading {origin}")
        from .. import checkpoint

        model = checkpoint.load(origin.file, trust_code=wanted.trust_code, allow_nonfinite=wanted.allow_nonfinite)
        return model, origin
    out.step(f"building {origin}")
    import torch

    from .. import sources

    if origin.source is None:
        raise ValueError("an origin has a file or a source")
    torch.manual_seed(wanted.seed)
    weights = origin.weights or "none"
    local = weights != "none" and (bool(Path(weights).suffix) or Path(weights).exists() or origin.source.runs_code)
    if values or local:
        model, source = sources.build(
            origin.source,
            weights,
            trust_pickle=wanted.trust_pickle,
            allow_nonfinite=wanted.allow_nonfinite,
            progress=out.live,
        )
    else:
        model, source = sources.outline(origin.source, weights)
    return model, replace(origin, source=source)


def example_inputs(model: nn.Module, shapes: list[tuple[int, ...]]) -> tuple[Tensor, ...] | None:
    """Random inputs of the shapes that --input gives; None without any."""
    if not shapes:
        return None
    from ..example import random_tensor

    return tuple(random_tensor(shape, model) for shape in shapes)


@contextmanager
def on_device(name: str, *models: nn.Module | None) -> Iterator[None]:
    """The networks on a device; afterwards they are on the CPU, where files are written from. Raises OptionError."""
    from ..devices import device_of

    device = device_of(name)
    try:
        for model in models:
            if model is not None:
                model.to(device)
        yield
    finally:
        for model in models:
            if model is not None:
                model.cpu()


def original_of(model: nn.Module, origin: Origin, instead: str, *, approximate: bool = False) -> nn.Module:
    """The network that a converted one was made from. Changes the one given.

    Raises RevertError, with `instead` as what to do, when it cannot be restored.
    """
    from ..errors import RevertError
    from ..undo import revert

    try:
        return revert(model, strict=not approximate)
    except RevertError as error:
        raise RevertError(error.message, hint=instead) from error
