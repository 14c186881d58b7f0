"""Which parameters of a network train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..arguments import one_of
from ..choices import PARAMETERS
from ..errors import Fix, NetworkError, Text
from ..norms.registry import identify

FLOAT32 = Text(
    "Train in float32: in Python model.float(); for a file, convert a network that its factory makes in float32: ",
    Fix("weights"),
    " of half precision are cast to it",
)


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
            hint=Text(FLOAT32, ". ", Fix("precision", "bf16"), " still computes in half of it."),
        )
    return found


def norm_parameters(model: nn.Module) -> set[Tensor]:
    """Gamma and beta of every normalization layer."""
    norms = (module for module in nn.Module.modules(model) if identify(module) is not None)
    return {p for norm in norms for p in norm._parameters.values() if p is not None}


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
