"""Figures of torchmetrics, over all processes."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import NormswapError
from .base import Reduce


def metric(name: str, *args: Any, **options: Any) -> Any:
    """A metric of `torchmetrics.classification`, by its name, for counts that have been checked.

    Imported with the first use: it takes seconds. Raises NormswapError where it is not installed.
    """
    try:
        from torchmetrics import classification
    except ImportError as error:
        raise NormswapError("validation needs torchmetrics", hint="pip install 'normswap[train]'") from error
    found = getattr(classification, name)(*args, validate_args=False, sync_on_compute=False, **options)
    found.update(torch.zeros(1).long(), torch.zeros(1).long())  # it warns where a process had nothing to count
    for state, counts in found.metric_state.items():
        setattr(found, state, torch.zeros_like(counts))
    return found


def over_all(metric: Any, total: Reduce) -> float:
    """The figure from the counts of all processes, each of which calls this; in float64, in which they are exact."""
    for name, counts in metric.metric_state.items():
        setattr(metric, name, total(counts.cpu().double()))
    return float(metric.compute())
