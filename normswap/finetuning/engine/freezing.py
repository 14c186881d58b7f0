"""What trains and what stays as it is, for the time of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ...freezing import freeze, frozen_drift, unfreeze
from ...modules.frozen_class import FrozenStatistics, freeze_of
from ...norms.registry import identify


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into train or eval mode, as it was."""
    modes = [(m, m.training) for m in nn.Module.modules(model)]
    try:
        yield
    finally:
        for module, mode in modes:
            module.train(mode) if isinstance(module, FrozenStatistics) else setattr(module, "training", mode)


@contextmanager
def frozen(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], *, stats: bool, affine: bool
) -> Iterator[list[str]]:
    """Freeze what was asked for, and the running statistics of norms outside of what trains; undone at the end.

    stats, affine: of all norms. Yields a list to which, at the end, a note on the frozen layers is added; layers that
    were frozen before stay frozen.
    """
    before = {m for m in nn.Module.modules(model) if freeze_of(m) is not None}
    if stats or affine:
        freeze(model, stats=stats, affine=affine)
    outside = [] if stats else _outside(model, parameters)
    if outside:
        freeze(model, stats=True, affine=False, modules=outside)
    new = [n for n, m in model.named_modules() if freeze_of(m) is not None and m not in before]
    notes: list[str] = []
    try:
        yield notes
    finally:
        if new or before:
            notes.append(str(frozen_drift(model)))
        if new:
            unfreeze(model, new)


def _outside(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Norms with running statistics none of whose parameters train: statistics that move would change them too."""
    trained = set(parameters.values())
    found = []
    for name, module in model.named_modules():
        if identify(module) is None or module._buffers.get("running_mean") is None or not name:
            continue
        own = list(module.parameters(recurse=False))
        if own and not any(p in trained for p in own):
            found.append(name)
    return found
