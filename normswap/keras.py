"""Keras 3 models: every BatchNormalization becomes a GroupNormalization, and what it has learned is kept.

A Keras layer keeps its tensors in no place of its own, and a Keras model its layers in a graph, so that neither can be
swapped as torch modules are; `keras.models.clone_model` builds the graph anew instead. Works on any backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import NormswapError, OptionError, PlanError
from .norms.group import fit_groups
from .norms.spec import DoesNotFit, NormRequest, NormState

_KERNEL_AXIS = {"Dense": -1} | {
    f"{name}{dims}D": axis for name, axis in (("Conv", -1), ("SeparableConv", -1)) for dims in (1, 2, 3)
}
_KERNEL_AXIS |= {f"Conv{dims}DTranspose": -2 for dims in (1, 2, 3)}
_DEPTHWISE = {"DepthwiseConv1D", "DepthwiseConv2D"}


@dataclass(frozen=True)
class _Norm:
    """A BatchNormalization, the layer that its statistics are folded into (None: into none), and its new groups."""

    layer: Any
    producer: Any
    groups: int

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, `(C,)` each, that standardise its input."""
        mean, var = (_values(v) for v in (self.layer.moving_mean, self.layer.moving_variance))
        scale = torch.rsqrt(var + self.layer.epsilon)
        return scale, -mean * scale


def to_group_norm(
    model: Any,
    *,
    groups: int | str = "auto",
    channels_per_group: int | None = None,
    indivisible: str = "error",
    epsilon: float = 1e-5,
) -> Any:
    """A copy of a Sequential or Functional Keras model with `GroupNormalization` for every `BatchNormalization`.

    The moving statistics are folded into the convolution or dense layer before each, or into a `Normalization` where
    there is none that feeds it alone; gamma and beta are carried over. `compile` the copy before you train it;
    `copy.save(...)` and `keras.models.load_model` know all its layers. `model` itself stays as it is.

    groups, channels_per_group, indivisible: as in `plan`. epsilon: of the new layers.
    Raises OptionError for what is no such model, PlanError with all layers that do not fit.
    """
    try:
        import keras
    except ImportError as error:
        raise NormswapError("a Keras model needs Keras 3", hint="pip install keras") from error

    if not isinstance(model, (keras.Sequential, keras.models.Model)) or not _graphs(model):
        raise OptionError(
            f"model: expected a built Sequential or Functional Keras model, got {type(model).__name__}",
            hint="A subclassed model has no graph of its layers; a Sequential one needs an Input or model.build.",
        )
    request = NormRequest(None if channels_per_group is not None else groups, channels_per_group, indivisible)
    norms = {id(norm.layer): norm for norm in _found(model, request)}
    folded = {id(norm.producer): norm for norm in norms.values() if norm.producer is not None}
    copies: list[tuple[Any, Any]] = []

    def cloned(layer: Any) -> Any:
        if id(layer) in norms:
            new = _group_norm(norms[id(layer)], epsilon)
        else:
            config = layer.get_config()
            new = type(layer).from_config({**config, "use_bias": True} if id(layer) in folded else config)
        copies.append((layer, new))
        return new

    copy = keras.models.clone_model(model, clone_function=cloned, recursive=True)
    for layer, new in copies:
        if id(layer) in norms:
            _carry(norms[id(layer)], new, epsilon)
        elif id(layer) in folded:
            new.set_weights(_folded(layer, *folded[id(layer)].statistics()))
        else:
            new.set_weights(layer.get_weights())
    return copy


def _graphs(model: Any) -> list[Any]:
    """The functional models in a model, itself first; none where it has no graph."""
    graph = getattr(model, "_functional", None) or model
    if not getattr(graph, "_nodes_by_depth", None):
        return []
    return [graph, *(inner for layer in model.layers if hasattr(layer, "layers") for inner in _graphs(layer))]


def _found(model: Any, request: NormRequest) -> list[_Norm]:
    norms, problems = [], []
    for layer, producer in _batch_norms(model):
        channels = int(layer.moving_mean.shape[0])
        try:
            groups = fit_groups(NormState(channels, layer.epsilon), request).num_groups
            norms.append(_Norm(layer, producer, groups))
        except DoesNotFit as misfit:
            problems.append(f"{layer.name} (BatchNormalization): {misfit}")
    if problems:
        total = len(problems)
        summary = f"{total} layer{'s' * (total != 1)} cannot be converted as asked:"
        raise PlanError(summary, problems, hint="indivisible='nearest' takes the largest divisor below.")
    if not norms:
        raise PlanError(f"{type(model).__name__} has no BatchNormalization", [])
    return norms


def _batch_norms(model: Any) -> Iterator[tuple[Any, Any]]:
    """Every BatchNormalization once, with the layer that feeds it alone, or None."""
    import keras

    graphs = _graphs(model)
    nodes = [
        node for graph in graphs for _, depth in sorted(graph._nodes_by_depth.items(), reverse=True) for node in depth
    ]
    outputs = {id(tensor) for graph in graphs for tensor in graph.outputs}
    calls: dict[int, list[Any]] = {}
    readers: dict[int, int] = {}
    for node in nodes:
        calls.setdefault(id(node.operation), []).append(node)
        for parent in node.parent_nodes:
            readers[id(parent)] = readers.get(id(parent), 0) + 1
    seen = set()
    for node in nodes:
        layer = node.operation
        if not isinstance(layer, keras.layers.BatchNormalization) or id(layer) in seen:
            continue
        seen.add(id(layer))
        before: Any = node.parent_nodes[0] if node.parent_nodes else None
        alone = before is not None and len(calls[id(layer)]) == 1 and len(calls.get(id(before.operation), ())) == 1
        read = alone and (readers[id(before)] > 1 or any(id(t) in outputs for t in before.output_tensors))
        yield layer, before.operation if alone and not read and _takes(before.operation, node, layer) else None


def _takes(producer: Any, node: Any, norm: Any) -> bool:
    """Whether the statistics of a norm can go into a layer's weights: it is linear, its channels those of the norm."""
    kind = type(producer).__name__
    if kind not in _DEPTHWISE and kind not in _KERNEL_AXIS:
        return False
    if not type(producer).__module__.startswith("keras.") or producer.activation.__name__ != "linear":
        return False
    if getattr(producer, "lora_enabled", False) or getattr(producer, "quantization_mode", None):
        return False  # its kernel is not all that it multiplies by
    rank = len(node.input_tensors[0].shape)
    first = getattr(producer, "data_format", "channels_last") == "channels_first"
    return bool(norm.axis % rank == (1 if first else rank - 1))


def _group_norm(norm: _Norm, epsilon: float) -> Any:
    """The new layer, under the old one's name; a Sequential where a fixed standardisation has to come before."""
    import keras

    old = norm.layer.get_config()
    same = ("axis", "center", "scale", "dtype", "trainable", "beta_regularizer", "gamma_regularizer")
    config = {name: old[name] for name in (*same, "beta_constraint", "gamma_constraint")}
    config |= {"groups": norm.groups, "epsilon": epsilon}
    if norm.producer is not None:
        return keras.layers.GroupNormalization.from_config({**config, "name": norm.layer.name})
    scale, shift = norm.statistics()
    variance = 1 / scale**2
    standardise = keras.layers.Normalization(
        axis=old["axis"], mean=(-shift / scale).tolist(), variance=variance.tolist(), name=f"{norm.layer.name}_fixed"
    )
    inner = keras.layers.GroupNormalization.from_config({**config, "name": f"{norm.layer.name}_group"})
    return keras.Sequential([standardise, inner], name=norm.layer.name)


def _carry(norm: _Norm, new: Any, epsilon: float) -> None:
    """Gamma and beta; gamma so that a channel of unit variance passes unchanged."""
    layer = new if norm.producer is not None else new.layers[-1]
    values = []
    if norm.layer.scale:
        values.append(_values(norm.layer.gamma) * (1 + epsilon) ** 0.5)
    if norm.layer.center:
        values.append(_values(norm.layer.beta))
    layer.set_weights([value.numpy() for value in values])


def _folded(layer: Any, scale: Tensor, shift: Tensor) -> list[Any]:
    """The weights of a layer whose outputs are scaled and shifted, a bias among them. Kernels end in (inputs, outputs),
    of transposed convolutions in (outputs, inputs), of depthwise ones in (channels, multiplier)."""
    weights = [torch.from_numpy(w).double() for w in layer.get_weights()]
    kernels, bias = (weights[:-1], weights[-1]) if layer.use_bias else (weights, torch.zeros_like(scale))
    last = kernels[-1]
    if type(layer).__name__ in _DEPTHWISE:
        last = last * scale.reshape(last.shape[-2:])
    else:
        last = last * (scale[:, None] if _KERNEL_AXIS[type(layer).__name__] == -2 else scale)
    return [weight.numpy() for weight in (*kernels[:-1], last, bias * scale + shift)]


def _values(variable: Any) -> Tensor:
    """In float64."""
    import keras

    return torch.from_numpy(keras.ops.convert_to_numpy(variable)).double()
