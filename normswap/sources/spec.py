"""A source as data: what goes into a converted file's manifest, so that its architecture can be rebuilt anywhere."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, Fix, SourceError, Text, WeightsError, first_line

KINDS = ("torchvision", "timm", "hf", "factory", "file")
FORMS = (
    "A source is a torchvision name, timm:NAME, hf:ID, package.module:factory, file.py:factory, or a file normswap "
    "wrote."
)


@dataclass(frozen=True)
class Source:
    """Where an architecture comes from. JSON values only.

    kind: one of KINDS. name: a model's name, an ID or folder, or a module's or file's factory as `PLACE:FACTORY`.
    args: keyword arguments of the builder. variant: named weights that decide the architecture too (torchvision's
    COCO weights have a frozen BN). config: a transformers config and class, so that no hub is needed again.
    weights: what the network was given, see `provenance.Weights`; it does not matter for rebuilding the architecture.
    """

    kind: str
    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    variant: str | None = None
    config: Mapping[str, Any] | None = None
    weights: Mapping[str, Any] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        prefix = {"timm": "timm:", "hf": "hf:"}.get(self.kind, "")
        return prefix + self.name

    @property
    def stem(self) -> str:
        """A file name's beginning for results: the last part of the name."""
        name = self.name.rpartition(":")[2] if self.kind in ("factory", "file") else self.name
        return name.rstrip("/").rpartition("/")[2] or "model"

    @property
    def runs_code(self) -> bool:
        """Whether building it runs code that is in no library normswap knows."""
        return self.kind in ("factory", "file")

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `weights` where they are known."""
        return {
            "kind": self.kind,
            "name": self.name,
            "args": dict(self.args),
            "variant": self.variant,
            "config": self.config,
            **({} if self.weights is None else {"weights": dict(self.weights)}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Source:
        """The inverse of `to_dict`. Raises CheckpointError for anything else."""
        try:
            source = cls(**values)
        except TypeError as error:
            raise CheckpointError(f"the manifest's source cannot be read: {error}") from error
        if source.kind not in KINDS:
            raise CheckpointError(f"the manifest's source is of an unknown kind, {source.kind!r}")
        return source


def near_file(path: Path) -> str | None:
    """A hint with the files of the same kind beside one that is not there, those whose names are near."""
    beside = path.parent.glob(f"*{path.suffix}") if path.suffix and path.parent.is_dir() else ()
    near = difflib.get_close_matches(path.name, sorted(p.name for p in beside if p.is_file()), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(str(path.with_name(name)) for name in near)}?" if near else None


def build_error(source: Source, error: BaseException) -> SourceError:
    """What to say when a builder, of whatever library, raises."""
    return SourceError(
        f"{source} cannot be built ({type(error).__name__}: {first_line(error)})",
        hint=Text("Arguments of its builder are given as ", Fix("args", {"KEY": "VALUE"}), "."),
    )


def offline_error(source: Source, tried: str, error: Exception) -> WeightsError:
    """What to say when published weights cannot be had."""
    return WeightsError(
        f"the weights of {source} cannot be downloaded: {tried} ({first_line(error)})",
        hint=Text(
            "Ways out: ",
            Fix("weights", "FILE"),
            " with a checkpoint you have, or ",
            Fix("weights", "none"),
            " for random weights.",
        ),
    )
