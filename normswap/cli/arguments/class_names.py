"""What the classes of a published network are called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .networks import ResolvedSource

if TYPE_CHECKING:
    from torch import nn


def class_names(model: nn.Module, origin: ResolvedSource) -> tuple[str, ...] | None:
    """As the library says that published it; None where it says nothing.

    They may be those of a head that the network has no longer: `evaluate` looks whether they are as many.
    """
    source = origin.source
    if source is not None and source.kind == "torchvision" and source.variant is not None:
        from torchvision.models import get_model_weights

        return tuple(get_model_weights(source.name)[source.variant].meta.get("categories", ())) or None
    known = getattr(getattr(model, "config", None), "id2label", None)  # transformers
    if isinstance(known, dict) and known:
        return tuple(str(known[number]) for number in sorted(known))
    return None
