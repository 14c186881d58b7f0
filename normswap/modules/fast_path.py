"""torch's one operation for a whole `nn.TransformerEncoderLayer`, which computes a LayerNorm whatever its norms are.

In eval mode, without gradients and hooks, the layer hands gamma, beta and eps of its norms to that operation, and never
calls them. So it must not where they are something else.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn import functional as F


def fit_fast_paths(model: nn.Module, norms: Collection[nn.Module]) -> None:
    """Let encoder layers that got new norms take the short way only if both are plain layer norms. In place.

    norms: the new ones. Layers whose norms are plain again get what torch's constructors give them.
    """
    changed = set()
    for layer in nn.Module.modules(model):
        if isinstance(layer, nn.TransformerEncoderLayer) and (layer.norm1 in norms or layer.norm2 in norms):
            layer.activation_relu_or_gelu = _activation(layer) if _plain(layer) else 0
            changed.add(layer)
    for encoder in nn.Module.modules(model):
        if isinstance(encoder, nn.TransformerEncoder) and not changed.isdisjoint(encoder.layers):
            encoder.use_nested_tensor = _nests(encoder)


def _plain(layer: Any) -> bool:
    norms = (layer.norm1, layer.norm2)
    return all(type(n) is nn.LayerNorm and n.weight is not None and n.bias is not None for n in norms)


def _activation(layer: Any) -> int:
    """As `nn.TransformerEncoderLayer` has it: 1 for ReLU, 2 for GELU, 0 for others."""
    if layer.activation is F.relu or isinstance(layer.activation, nn.ReLU):
        return 1
    return 2 if layer.activation is F.gelu or isinstance(layer.activation, nn.GELU) else 0


def _nests(encoder: Any) -> bool:
    """As `nn.TransformerEncoder` decides it by its first layer."""
    layer = encoder.layers[0]
    attention = layer.self_attn
    return bool(
        encoder.enable_nested_tensor
        and not layer.norm_first
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.in_proj_bias is not None
        and layer.activation_relu_or_gelu
        and layer.norm1.eps == layer.norm2.eps
        and attention.num_heads % 2 == 0
    )
