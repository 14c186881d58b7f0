"""How far a student's outputs are from its teacher's, as a loss with gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..comparison.outputs import floating
from ..modules.precision import at_least_float32


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, mean over N.

    teacher, student: class scores before softmax, `(N, K)`; computed in at least float32. The factor keeps the size
    of the gradient independent of T. Source: Hinton, Vinyals and Dean 2015, "Distilling the knowledge in a neural
    network", section 2.
    """
    p = F.log_softmax(at_least_float32(teacher) / temperature, dim=1)
    q = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def distance(teacher: Tensor, student: Tensor) -> Tensor:
    """`||teacher - student||^2 / ||teacher||^2`, of tensors of one shape; the mean square where the teacher is zero.

    The scale of the output does not matter, so one learning rate suits networks of any kind.
    """
    a, b = at_least_float32(teacher), at_least_float32(student)
    size = a.square().sum()
    squares = (a - b).square().sum()
    return squares / torch.where(size > 0, size, float(max(a.numel(), 1)))


def scores_in(tree: Any) -> str | None:
    """The name, among `floating(tree)`, of a classifier's scores `(N, K)` with K > 1; None if there are none.

    A tensor that is the whole output, or `logits` in a mapping such as a transformers output.
    """
    tensors = floating(tree)
    name = "logits" if isinstance(tree, Mapping) else ""
    found = tensors.get(name)
    return name if found is not None and found.dim() == 2 and found.shape[1] > 1 else None


def loss_of(
    teacher: Any, student: Any, temperature: float, kind: str = "auto", *, without: Collection[str] = ()
) -> Tensor | None:
    """The loss between two outputs of one structure: tensor, list, tuple, dict, dataclass. None where nothing is left.

    kind: "auto" takes `divergence` for a classifier's scores (see `scores_in`) and the mean of `distance` over all
    other floating tensors, and adds the two; "match" takes `distance` for all of them. without: names among
    `floating(teacher)` that are left out, those with them that the two do not have in one shape.
    """
    a, b = floating(teacher), floating(student)
    names = [name for name in a if name not in without]
    scores = scores_in(teacher) if kind == "auto" else None
    terms = []
    if scores in names:
        terms.append(divergence(a[scores].to(b[scores].device), b[scores], temperature))
    rest = [distance(a[n].to(b[n].device), b[n]) for n in names if n != scores and a[n].numel()]
    if rest:
        terms.append(torch.stack([one.to(rest[0].device) for one in rest]).mean())
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None


def agreement_of(teacher: Any, student: Any, *, without: Collection[str] = ()) -> float | None:
    """Share of samples with the same best class; None where the output holds no scores, or they are left out."""
    name = scores_in(teacher)
    if name is None or name in without:
        return None
    a, b = floating(teacher)[name], floating(student)[name]
    return float((a.argmax(1).to(b.device) == b.argmax(1)).float().mean())
