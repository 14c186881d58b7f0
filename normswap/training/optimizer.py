"""The optimizers: what decays, and what the learning rate of each parameter is relative to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from .parameters import norm_parameters

MOMENTUM = 0.9
WEIGHT_SIZE, VECTOR_SIZE = 1e-3, 0.1


def build_optimizer(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], kind: str, weight_decay: float
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019) or SGD with Nesterov momentum; vectors (gamma, beta, biases) do not decay."""
    plain = _vectors(model, parameters)
    decayed = [p for p in parameters.values() if p not in plain]
    split = ((decayed, weight_decay), ([p for p in parameters.values() if p in plain], 0.0))
    groups = [{"params": group, "weight_decay": decay} for group, decay in split if group]
    kinds = {p.device.type for p in parameters.values()}
    fused = len(kinds) == 1 and kinds <= {"cpu", "cuda"} and all(p.is_floating_point() for p in parameters.values())
    if kind == "adamw":
        return AdamW(groups, fused=fused)
    return SGD(groups, momentum=MOMENTUM, nesterov=True, fused=fused)


@torch.no_grad()
def relative_adamw(model: nn.Module, parameters: Mapping[str, nn.Parameter], weight_decay: float) -> AdamW:
    """AdamW with a group for each parameter, whose `size` its learning rate is to have.

    size: the root mean square of the parameter as it is now. Adam moves every value by about the learning rate, so
    a rate relative to the size moves all layers alike, however wide they are and whatever was folded into them
    (Shazeer and Stern 2018, "Adafactor", section 8). It is at least 0.001; at least 0.1 for norm parameters, biases
    and all other vectors, which may start from zero, and do not decay.
    """
    plain = _vectors(model, parameters)
    groups: list[dict[str, Any]] = []
    for p in parameters.values():
        least = VECTOR_SIZE if p in plain else WEIGHT_SIZE
        size = max(least, float(p.double().square().mean().sqrt())) if p.numel() else least
        groups.append({"params": [p], "weight_decay": 0.0 if p in plain else weight_decay, "size": size})
    return AdamW(groups)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give each group the learning rate, relative to its `size` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("size", 1.0)


def _vectors(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[Tensor]:
    norms = norm_parameters(model)
    return {p for p in parameters.values() if p in norms or p.dim() <= 1}
