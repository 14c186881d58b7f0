"""Which parameters train, at which rate by default; and an average of the weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ...errors import Fix, OptionError, Text
from ...modules.path_ranges import matches
from ...training.parameters import norm_parameters

RATES = {"adamw": 2e-4, "sgd": 1e-3}
"""The largest learning rate at a global batch of `RATED_AT`."""
RATED_AT = 2


def default_rate(optimizer: str, global_batch: int) -> float:
    """AdamW's grows with the square root of the batch (Malladi et al. 2022), SGD's linearly (Goyal et al. 2017)."""
    ratio = global_batch / RATED_AT
    return RATES[optimizer] * (math.sqrt(ratio) if optimizer == "adamw" else ratio)


def trained(
    model: nn.Module, train: str, head: Collection[str] | None, *, affine: bool = True
) -> dict[str, nn.Parameter]:
    """What `train` stands for, among the parameters that require a gradient.

    train: "all", "norm" (gamma and beta), "head" (the names in `head`), or a pattern of names, such as "layer4.*".
    affine=False leaves gamma and beta of all norms out. Raises OptionError when nothing is left.
    """
    if not isinstance(train, str):
        raise OptionError(f"train must be a word or a pattern, got {train!r}")
    norms = norm_parameters(model)
    if train == "head" and head is None:
        raise OptionError(
            "the head of this network is not known", hint=Text("Name its parameters: ", Fix("train", "fc.*"))
        )

    def wanted(name: str, parameter: nn.Parameter) -> bool:
        if train == "norm":
            return parameter in norms
        return train == "all" or (name in (head or ()) if train == "head" else matches(train, name))

    found = {n: p for n, p in model.named_parameters() if wanted(n, p)}
    if not found:
        names = ", ".join(sorted({n.split(".")[0] for n, _ in model.named_parameters()})[:12])
        raise OptionError(
            f"no parameter of the network matches {train!r}, which was to train",
            hint=Text(Fix("train"), f" takes all, norm, head, or a pattern of names, which begin with {names}."),
        )
    found = {n: p for n, p in found.items() if p.requires_grad and (affine or p not in norms)}
    if not found:
        raise OptionError(f"all that {train!r} stands for is frozen, so nothing trains")
    return found


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of parameters and buffers, on the model's device.

    The decay grows from 0.1 towards `decay` as `(1 + n) / (10 + n)` over the first updates, so that a short run is
    not dominated by its start (as in TensorFlow's `ExponentialMovingAverage`).
    """

    @torch.no_grad()
    def update(kept: Sequence[Tensor], now: Sequence[Tensor], count: Tensor | int) -> None:
        n = int(count)
        share = 1 - min(decay, (1 + n) / (10 + n))
        if kept[0].is_floating_point() or kept[0].is_complex():
            torch._foreach_lerp_(list(kept), list(now), share)
        else:
            for a, b in zip(kept, now, strict=True):
                a.copy_(b)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
