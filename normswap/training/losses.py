"""How far a student's outputs are from its teacher's, as a loss with gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..comparison.outputs import are_detections, floating
from ..errors import DataError, Fix, Text
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


def loss_of(teacher: Any, student: Any, temperature: float, kind: str = "auto", *, learning: bool = True) -> Tensor:
    """The loss between two outputs of one structure: tensor, list, tuple, dict, dataclass.

    kind: "auto" takes `divergence` for a classifier's scores (see `scores_in`) and the mean of `distance` over all
    other floating tensors, and adds the two; "match" takes `distance` for all of them. learning: the loss has to have a
    gradient.

    Raises DataError when the outputs differ in structure or shape, hold no floating tensor, or have no gradient.
    """
    if are_detections(teacher):
        raise DataError(
            "the network gives boxes, which have no gradient to learn from",
            hint="Distil its backbone: the sub-network that gives feature maps.",
        )
    a, b = floating(teacher), floating(student)
    _check(a, b, learning=learning)
    scores = scores_in(teacher) if kind == "auto" else None
    rest = [name for name in a if name != scores and a[name].numel()]
    device = next(iter(b.values())).device
    total = torch.zeros((), device=device)
    if scores is not None:
        total = total + divergence(a[scores].to(device), b[scores], temperature)
    if rest:
        total = total + torch.stack([distance(a[name].to(device), b[name]) for name in rest]).mean()
    return total


def agreement_of(teacher: Any, student: Any) -> float | None:
    """Share of samples with the same best class; None where the output holds no scores."""
    name = scores_in(teacher)
    if name is None:
        return None
    a, b = floating(teacher)[name], floating(student)[name]
    return float((a.argmax(1).to(b.device) == b.argmax(1)).float().mean())


def _check(a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, learning: bool) -> None:
    if not a:
        raise DataError("the network's output holds no floating tensor, so there is nothing to learn from")
    shapes = [", ".join(f"{n} {tuple(t.shape)}".strip() for n, t in tree.items()) or "no tensor" for tree in (a, b)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"the networks' outputs do not compare: the original gives {shapes[0]}, the student {shapes[1]}",
            hint="Distil from the network that was converted, or one with the same head.",
        )
    if learning and not any(t.requires_grad for t in b.values()):
        raise DataError(
            "the network's output has no gradient: it is computed without one, or from layers that are not trained",
            hint=Text("Give the part that can be trained, or ", Fix("train", "all"), "."),
        )
