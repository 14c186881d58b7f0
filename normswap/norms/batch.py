"""BatchNorm1d/2d/3d (`bn`) and SyncBatchNorm (`sync`).

Ioffe and Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift"; modules of torch.nn, timm's fused BatchNormAct2d and SyncBatchNormAct, those of timm_3d, inplace_abn and
asteroid, lightly's SplitBatchNorm, and the synchronised ones of detectron2, pytorchvideo and mmcv.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ._building import as_parameter, read_statistics_norm, require_dims
from .registry import register
from .spec import NormSpec, NormState, Options

BY_DIMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_DIMS = {cls: dims for dims, cls in BY_DIMS.items()}
ATTRIBUTES = ("num_features", "momentum", "track_running_stats")
_OF_ABN = ("activation", "activation_param", "act_name", "act_param")


def insists_on_one_dim(module: nn.Module) -> bool:
    """Whether a norm refuses inputs of other than two or three dimensions, as torch's BatchNorm1d does."""
    return getattr(type(module), "_check_input_dim", None) is nn.BatchNorm1d._check_input_dim


def _read(module: Any) -> NormState:
    dims = next((_DIMS[c] for c in type(module).__mro__ if c in _DIMS), None)
    state = read_statistics_norm(module, dims=dims)
    if hasattr(module, "num_splits") and state.has_statistics:  # of each part of a batch; the first are those of eval
        mean, var = (t[: state.channels].clone() for t in state.statistics)
        state = replace(state, running_mean=mean, running_var=var)
    if not any(cls.__module__ in _ABN for cls in type(module).__mro__):
        return state
    weight = state.weight
    if weight is not None and type(module).forward.__qualname__ != "ABN.forward":
        weight = weight.detach().abs() + state.eps  # what its kernels multiply by
    act = _activation(module)
    return replace(state, weight=weight, tail={} if act is None else {"act": act})


_ABN = ("inplace_abn.abn", "timm.layers.inplace_abn")


def _activation(module: Any) -> nn.Module | None:
    """What inplace_abn runs behind the norm, as a module."""
    if module.__class__.__module__.startswith("timm."):
        name, value = module.act_name, module.act_param
    else:
        name, value = module.activation, module.activation_param
    known: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "leaky_relu": lambda: nn.LeakyReLU(value),
        "elu": lambda: nn.ELU(value),
    }
    return known[name]() if name in known else None


def build_with_statistics(cls: type[nn.Module], state: NormState, options: Options) -> Any:
    """An instance of a `torch.nn` batch norm class holding the state's own tensors, without allocating others."""
    eps = state.eps if options.eps is None else options.eps
    module: Any = cls(state.channels, eps=eps, momentum=state.momentum, affine=False, track_running_stats=False)
    if state.weight is not None:
        module.affine = True
        module._parameters["weight"] = as_parameter(state.weight)
        module._parameters["bias"] = None if state.bias is None else as_parameter(state.bias)
    if state.has_statistics:
        module.track_running_stats = True
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            module._buffers[name] = getattr(state, name)
        if module._buffers["num_batches_tracked"] is None:
            module._buffers["num_batches_tracked"] = state.statistics[0].new_zeros((), dtype=torch.long)
    module.training = state.training
    return module


def _build_batch(state: NormState, options: Options) -> nn.Module:
    return build_with_statistics(BY_DIMS[require_dims(state)], state, options)


def _build_sync(state: NormState, options: Options) -> nn.Module:
    module = build_with_statistics(nn.SyncBatchNorm, state, options)
    module.process_group = state.process_group
    return module


register(
    NormSpec(
        name="bn",
        title="BatchNorm",
        formula="y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over the batch; running ones in eval",
        axes="N and positions, per channel",
        source="Ioffe and Szegedy 2015; torch.nn.BatchNorm1d/2d/3d",
        read=_read,
        build=_build_batch,
        classes=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        class_names=(
            "timm.layers.norm_act.BatchNormAct2d",
            "timm_3d.layers.norm_act.BatchNormAct3d",
            "asteroid.masknn.norms.BatchNorm",
            "timm.layers.inplace_abn.InplaceAbn",
            "inplace_abn.abn.ABN",
            "inplace_abn.abn.InPlaceABN",
            "lightly.models.batchnorm.SplitBatchNorm",
        ),
        aliases=("batchnorm",),
        attributes=(*ATTRIBUTES, *_OF_ABN, "num_splits"),
        statistics="batch",
        small_batch="process",
        needs_dims=True,
    )
)
register(
    NormSpec(
        name="sync",
        title="SyncBatchNorm",
        formula="as bn, mean and var over the batches of all processes",
        axes="N of all processes and positions, per channel",
        source="torch.nn.SyncBatchNorm",
        read=_read,
        build=_build_sync,
        classes=(nn.SyncBatchNorm,),
        class_names=(
            "timm.layers.norm_act.SyncBatchNormAct",
            "inplace_abn.abn.InPlaceABNSync",
            "detectron2.layers.batch_norm.NaiveSyncBatchNorm",
            *(f"pytorchvideo.layers.batch_norm.NaiveSyncBatchNorm{dims}d" for dims in (1, 2, 3)),
            "mmcv.ops.sync_bn.SyncBatchNorm",
        ),
        aliases=("syncbn", "syncbatchnorm"),
        attributes=(*ATTRIBUTES, *_OF_ABN, "process_group", "group", "group_size", "_stats_mode"),
        statistics="batch",
        small_batch="all",
    )
)
