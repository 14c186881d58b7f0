"""The norm types. Each file registers its own; importing this package makes them all known.

The order here is the order of `normswap norms`.
"""

from . import batch, frozen, fused, group, instance, layer, renorm

__all__ = ["batch", "frozen", "fused", "group", "instance", "layer", "renorm"]
