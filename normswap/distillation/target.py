"""What a student is to give as its teacher does: the outputs, and what the norms inside give."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..comparison.outputs import are_detections, floating, kind_of, unlike
from ..comparison.verification import same_layers
from ..data.batches import run_on
from ..errors import DataError, Fix, Text, plural
from ..modules.restore import is_detector
from ..training.losses import agreement_of, loss_of
from .feature_loss import Features
from .settings import Settings

Outputs = Callable[..., Any]
FEWER = "Take a smaller batch_size."
_INSIDE = Text("Learn from the norms inside: leave out ", Fix("features", 0), ".")


@dataclass(frozen=True)
class Answers:
    """What the two networks gave on one batch; inner: how far the norms inside are apart, if they were watched."""

    wanted: Any
    given: Any
    inner: Tensor | None


class Target:
    """Runs a teacher and its student, and says how far the student is from it.

    Output tensors whose length each network finds by itself (boxes, key points) do not compare and are left out. Where
    nothing is left, the norms inside are all that there is to learn from: `inside` is then True.
    """

    def __init__(self, reference: nn.Module, model: nn.Module, settings: Settings) -> None:
        self.reference, self.model, self.settings = reference, model, settings
        self._outputs = outputs_of(reference), outputs_of(model)
        self._features = Features(reference, model)
        self._left_out: set[str] = set()
        self.inside = False

    def run(self, args: tuple[Any, ...], *, inside: bool) -> Answers:
        """Both networks' outputs on one batch, the teacher's without gradients. inside: watch the norms too.

        Raises DataError for whatever a forward raises on it, and where the batch or the teacher's output is not finite.
        """
        with self._features.watching() if inside else nullcontext():
            with torch.no_grad():
                wanted = _run(self._outputs[0], self.reference, args)
            given = _run(self._outputs[1], self.model, args)
        _check_finite(args, wanted)
        return Answers(wanted, given, self._features.loss() if inside else None)

    @property
    def compared(self) -> tuple[bool, frozenset[str]]:
        """By what the student is compared: by the norms inside, or by the outputs without those that are named."""
        return self.inside, frozenset(self._left_out)

    def leave_out(self, answers: Answers) -> None:
        """Leave out, from now on, what the two do not have in one shape.

        Raises DataError where the networks differ in more than their norms, in their heads say, and where nothing is
        left to compare.
        """
        found = _unlike(answers)
        if found and not same_layers(self.reference, self.model):
            raise _other_outputs(answers)
        self._left_out |= {kind_of(name) for name in found}
        if not self.inside and floating(answers.wanted).keys() <= self._missing(answers):
            self._learn_inside()

    def compares(self, answers: Answers) -> bool:
        """Whether all that is to be compared is there in one shape; outputs may have come to differ in length."""
        return self.inside or {kind_of(name) for name in _unlike(answers)} <= self._left_out

    def outer(self, answers: Answers) -> Tensor | None:
        """The loss of the outputs, without what is left out; None where this batch has nothing else."""
        settings = self.settings
        return loss_of(
            answers.wanted, answers.given, settings.temperature, settings.loss, without=self._missing(answers)
        )

    def agreement(self, answers: Answers) -> float | None:
        """Share of samples that both decide alike, None where the outputs are no scores that compare."""
        return agreement_of(answers.wanted, answers.given, without=self._missing(answers))

    def _missing(self, answers: Answers) -> set[str]:
        return _unlike(answers) | {name for name in floating(answers.wanted) if kind_of(name) in self._left_out}

    def loss(self, answers: Answers, weight: float) -> Tensor:
        """What a step lowers: the outputs' loss and so much of the norms', which count fully where they are all.

        Raises DataError where none of it has a gradient.
        """
        outer = None if self.inside else self.outer(answers)
        if answers.inner is None or outer is None:
            loss = answers.inner if outer is None else outer
        else:
            loss = outer + weight * answers.inner
        if loss is None and not self.compares(answers):
            raise DataError("the networks' outputs have come to differ in length", hint=_INSIDE)
        if loss is None or not loss.requires_grad:
            raise DataError(
                "the network's output has no gradient: it is computed without one, or from layers that are not trained",
                hint=Text("Give the part that can be trained, or ", Fix("train", "all"), "."),
            )
        return loss

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of what was learned."""
        norms = plural(len(self._features.paths), "norm")
        return (f"the outputs do not compare, so the loss is that of the {norms} inside",) if self.inside else ()

    def _learn_inside(self) -> None:
        if not self._features.paths:
            raise DataError("the networks' outputs do not compare, nor has the original the converted norms' paths")
        if not self.settings.features:
            raise DataError(
                "the networks' outputs do not compare: they hold no floating tensor, or as many as each network finds",
                hint=_INSIDE,
            )
        self.inside = True


def outputs_of(model: nn.Module) -> Outputs:
    """A function of forward's arguments that gives what a student can be compared by, and learn from.

    The model itself, but for torchvision's detectors, whose boxes after non-maximum suppression have no gradient: for
    them the feature maps of the backbone, and what the dense head (or the region proposal network's) makes of them.
    """
    if not (is_detector(model) and isinstance(getattr(model, "backbone", None), nn.Module)):
        return model
    network: Any = model

    def features(images: Any) -> dict[str, Any]:
        batch, _ = network.transform(list(images))
        maps = network.backbone(batch.tensors)
        maps = {"0": maps} if isinstance(maps, torch.Tensor) else maps
        head = getattr(network, "head", None) or getattr(getattr(network, "rpn", None), "head", None)
        return {"features": maps, "head": {} if head is None else head(list(maps.values()))}

    return features


def _unlike(answers: Answers) -> set[str]:
    """The output tensors that do not compare; all of them for boxes, which have no order in which to compare them."""
    wanted, given = floating(answers.wanted), floating(answers.given)
    return set(wanted.keys() | given.keys()) if are_detections(answers.wanted) else unlike(wanted, given)


def _run(outputs: Outputs, model: nn.Module, args: tuple[Any, ...]) -> Any:
    return run_on(outputs, model, args, fewer=FEWER)


def _check_finite(args: tuple[Any, ...], wanted: Any) -> None:
    """Raise DataError where it is the image, or the original network, that is to blame."""
    for what, tree in (("a batch of the data", args), ("the original network's output", wanted)):
        if any(not bool(t.isfinite().all()) for t in floating(tree).values()):
            raise DataError(f"{what} holds NaN or Inf")


def _other_outputs(answers: Answers) -> DataError:
    trees = (floating(answers.wanted), floating(answers.given))
    ours, theirs = (
        ", ".join(f"{n} {tuple(t.shape)}".strip() for n, t in tree.items()) or "no tensor" for tree in trees
    )
    return DataError(
        f"the networks' outputs do not compare: the original gives {ours}, the student {theirs}",
        hint="Distil from the network that was converted, or one with the same head.",
    )
