"""AdamW for a converted network: which parameters train, which decay, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..arguments import one_of
from ..choices import PARAMETERS
from ..errors import Fix, NetworkError, Text
from ..norms.registry import identify

WARM_UP = 0.1
FINAL = 0.01
WEIGHT_SIZE, VECTOR_SIZE = 1e-3, 0.1


def one_cycle(step: int, steps: int) -> float:
    """The share of the learning rate at a step, 0 <= step < steps: a linear rise over the first tenth, then a cosine.

    The rise matters: right after a conversion gradients are several times larger than later. Source: Smith and Topin
    2018, "Super-convergence", with a cosine as in `torch.optim.lr_scheduler.OneCycleLR`. A function of the step
    alone, so that a resumed run needs no state of it.
    """
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm + 1) / (steps - warm)
    return FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * done))


def trained_parameters(model: nn.Module, train: str) -> dict[str, nn.Parameter]:
    """What `train` stands for: "all" parameters that require a gradient, or those of "norm" layers among them.

    Raises OptionError for another word, when nothing is left to train, and for weights of half precision, in which
    small steps are lost to rounding.
    """
    one_of("train", train, PARAMETERS)
    norms = norm_parameters(model)
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and (train == "all" or p in norms)}
    if not found:
        what = "parameter" if train == "all" else "gamma or beta"
        raise NetworkError(
            f"no {what} of the network requires a gradient", hint="model.requires_grad_(True) lets all train."
        )
    narrow = next((n for n, p in found.items() if p.dtype not in (torch.float32, torch.float64)), None)
    if narrow is not None:
        raise NetworkError(
            f"{narrow} is {found[narrow].dtype}, in which small steps are lost to rounding",
            hint=Text("Train in float32: model.float(); ", Fix("precision", "bf16"), " still computes in half of it."),
        )
    return found


def norm_parameters(model: nn.Module) -> set[Tensor]:
    """Gamma and beta of every normalization layer."""
    norms = (module for module in model.modules() if identify(module) is not None)
    return {p for norm in norms for p in norm._parameters.values() if p is not None}


@torch.no_grad()
def adamw(model: nn.Module, parameters: dict[str, nn.Parameter], weight_decay: float) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019) with a group for each parameter, whose `size` its learning rate is to have.

    size: the root mean square of the parameter as it is now. Adam moves every value by about the learning rate, so
    a rate relative to the size moves all layers alike, however wide they are and whatever was folded into them
    (Shazeer and Stern 2018, "Adafactor", section 8). It is at least 0.001; at least 0.1 for norm parameters, biases
    and all other vectors, which may start from zero, and do not decay.
    """
    norms = norm_parameters(model)
    groups = []
    for p in parameters.values():
        vector = p in norms or p.dim() <= 1
        least = VECTOR_SIZE if vector else WEIGHT_SIZE
        size = max(least, float(p.double().square().mean().sqrt())) if p.numel() else least
        groups.append({"params": [p], "weight_decay": 0.0 if vector else weight_decay, "size": size})
    return AdamW(groups)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give each group the learning rate `rate * size`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["size"]


@contextmanager
def training_only(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Let only these parameters require a gradient; flags and gradients come back as they were."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    wanted = set(parameters.values())
    try:
        for p, _, _ in before:
            p.grad = None
            p.requires_grad_(p in wanted)
        yield
    finally:
        for p, flag, gradient in before:
            p.requires_grad_(flag)
            p.grad = gradient
