"""A converted network and its original, as `calibrate` and `distil` open them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from ..terminal.output import Output
from . import options
from .networks import ResolvedSource, SourceRequest, files_read, locate, open_network, open_original, restored

if TYPE_CHECKING:
    from torch import nn


class OpenedPair(NamedTuple):
    """The converted network and what it is; the original, None where it is to be rebuilt, and what that is."""

    model: nn.Module
    origin: ResolvedSource
    teacher: nn.Module | None
    teacher_origin: ResolvedSource

    def written(self, target: Path) -> dict[str, Any]:
        """JSON values: what they are, and the file that the result went to."""
        return {"network": self.origin.to_dict(), "reference": self.teacher_origin.to_dict(), "output": str(target)}


@dataclass(frozen=True)
class Pair:
    """What was asked for. original: None where it is to be rebuilt from the converted file."""

    converted: SourceRequest
    original: SourceRequest | None

    @classmethod
    def of(cls, ctx: typer.Context) -> Pair:
        """FILE and --reference, of which --weights and --arg are. Raises a usage error for these without it."""
        asked, reference = SourceRequest.of(ctx, ctx.params["file"]), ctx.params["reference"]
        if reference is None and (asked.weights or asked.args):
            raise options.usage(ctx, "--weights and --arg go with --reference")
        converted = replace(asked, weights=None, args=(), trust_pickle=False)
        return cls(converted, None if reference is None else replace(asked, text=reference, source=None))

    def opened(self, ctx: typer.Context, out: Output, target: Path, *, overwrite: bool) -> OpenedPair:
        """Both networks; before anything is loaded, `target` is reserved for the result."""
        from ...files.writing import reserved

        origin = locate(ctx, self.converted)
        other = None if self.original is None else (locate(ctx, self.original), self.original)
        inputs = files_read((origin, self.converted), other)
        ctx.with_resource(reserved(target, overwrite=overwrite, inputs=inputs))
        model, origin = open_network(origin, self.converted, out)
        if self.original is None:
            return OpenedPair(model, origin, None, restored(origin))
        return OpenedPair(model, origin, *open_original(ctx, self.original, origin, self.converted, out))
