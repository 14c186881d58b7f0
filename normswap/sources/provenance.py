"""Which weights a network was given, as data: their name, what repeats them, and a digest to tell them by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .spec import Source
from .weights import digest_of


@dataclass(frozen=True)
class Weights:
    """The weights of one network. JSON values only.

    name: a file, the name of published weights, or whose they are. random: nobody has trained them. given: what
    `--weights` has to be given to have them again, None where leaving it out gives them. digest: see
    `weights.digest_of`; None where no values were read. cast: what became of the dtype of a file's values in the
    network, such as `float16 to float32`; None where it is the network's own.
    """

    name: str
    random: bool = False
    given: str | None = None
    digest: str | None = None
    cast: str | None = None

    def __str__(self) -> str:
        return self.name

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, source: Mapping[str, Any] | None) -> Weights | None:
        """Those that a source in a manifest names; None where it does not say."""
        values = (source or {}).get("weights")
        return None if values is None else cls(**{k: v for k, v in values.items() if k in cls.__dataclass_fields__})


NOT_READ = Weights("not read")
OWN = "the factory's own"


def weights_of(
    model: nn.Module, source: Source, asked: str, *, file: bool, seed: int, cast: str | None = None
) -> Weights:
    """What `sources.build` gave `model`. asked: its argument `weights`; file: whether that is one; seed: used.

    cast: what `sources.build` told of it.
    """
    digest = digest_of(model.state_dict())
    if asked == "none":
        return Weights("random", random=True, given="none", digest=digest)
    if file:
        return Weights(asked, given=asked, digest=digest, cast=cast)
    given = None if asked == "DEFAULT" else asked
    if source.runs_code:
        if _untrained(model, source, digest, seed):
            return Weights(f"random: {OWN}", random=True, digest=digest)
        return Weights(OWN, digest=digest)
    tag = (getattr(model, "pretrained_cfg", None) or {}).get("tag") if source.kind == "timm" else None
    return Weights(source.variant or tag or given or f"those of {source}", given=given, digest=digest)


def _untrained(model: nn.Module, source: Source, digest: str, seed: int) -> bool:
    """Whether a factory leaves its network as the layers' constructors do.

    Running statistics tell, since every training moves them; without any, random is what another seed changes.
    """
    found = [
        (leaf, values)
        for module in nn.Module.modules(model)
        for leaf in ("running_mean", "running_var")
        if (values := module._buffers.get(leaf)) is not None
    ]
    if found:
        return all(bool(torch.eq(values, float(leaf == "running_var")).all()) for leaf, values in found)
    from .resolve import build_full

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return digest_of(build_full(source).state_dict()) != digest
