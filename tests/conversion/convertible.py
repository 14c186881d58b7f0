"""What the tests of converting share."""

from __future__ import annotations

from typing import Any

from torch import nn

import normswap

TARGETS = ["gn", "ln", "ln-channel", "in", "frozen", "bn", "sync", "renorm", "fused"]
AFFINE_TARGETS = [t for t in TARGETS if t not in ("frozen", "fused")]


def converted(net: nn.Module, to: str = "gn", **options: Any) -> nn.Module:
    groups = 2 if to == "gn" else None
    return normswap.convert(net, to=to, **{"groups": groups, **options})
