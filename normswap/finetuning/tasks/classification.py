"""Classification: images and one label each, cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.one_batch import Forward
from ...data.preprocess import Preprocess
from ...errors import DataError, Fix, NormswapError, OptionError, Text, first_line
from ...heads.classifier import Head, find_head, scores_of
from ...modules.path_ranges import matches
from ...modules.tree import device_and_dtype
from ...modules.wrappers import unwrapped
from ...training.distributed import gathered
from ...training.losses import divergence
from ...training.parameters import FLOAT32
from ..datasets.augmentation import Plain, settled, training_transform
from ..datasets.batched import LABELLED, batch_of, called
from ..datasets.labelled import PICTURES, LabelledImages, open_one, open_sets, some_inputs, transformed
from ..datasets.loader import Tensors, spread
from ..datasets.mixing import Mixing
from ..datasets.splits import Sets
from ..output.by_class import Answers, ByClass, accuracies, named, summed
from ..output.panel import Panel
from .base import Outcome, Reduce, on_device
from .head import fitted
from .metrics import metric, over_all

AUXILIARY = 0.3
"""The weight of auxiliary classifiers' losses (Szegedy et al. 2014, section 5)."""
TEMPERATURE = 2.0


@dataclass
class Classification:
    """Cross-entropy on labels, and, with a teacher, `distil` of the loss on the teacher's scores instead.

    teacher: the original network, in eval mode, never changed; its share of the loss is
    `T^2 KL(softmax(teacher / T) || softmax(model / T))` at T = 2 (Hinton, Vinyals and Dean 2015).
    mixing: of the training batches, whose accuracy is then that of the larger share. random: changes of RandAugment for
    each training picture. forward: what the network takes, once data is opened for it.
    """

    label_smoothing: float = 0.0
    teacher: nn.Module | None = None
    distil: float = 0.0
    mixing: Mixing = field(default_factory=Mixing)
    random: int | None = None
    forward: Forward | None = None

    name: ClassVar[str] = "classification"
    best: ClassVar[str] = "val_accuracy"
    at_once: ClassVar[int] = 32
    compiled_part: ClassVar[str | None] = None
    panels: ClassVar[tuple[Panel, ...]] = (
        Panel("loss", ("loss", "val_loss")),
        Panel("accuracy", ("accuracy", "val_accuracy")),
    )

    def open(self, model: nn.Module, data: Any, eval_data: Any, *, seed: int) -> Sets:
        """See `open_sets`."""
        self.forward = Forward.of(unwrapped(model))
        return open_sets(data, eval_data, seed=seed, network=self.forward)

    def open_one(self, model: nn.Module, data: Any) -> Sets:
        """See `labelled.open_one`."""
        self.forward = Forward.of(unwrapped(model))
        return open_one(data, self.forward)

    def prepared(self, sets: Sets, preprocess: Callable[[Any], Tensor] | None, augment: str) -> Sets:
        """With random crops and mirroring in training, as `augment` says, for pictures in files."""
        prepare = preprocess or Preprocess()
        train = training_transform(prepare, augment, self.random)  # checks the word, also for data without pictures
        if self.random is not None and not isinstance(sets.train, PICTURES):
            raise OptionError(
                Text(Fix("rand_augment"), f" changes pictures in files, and the data is {type(sets.train).__name__}"),
                hint="A Dataset of your own can draw v2.RandAugment() itself.",
            )
        if isinstance(sets.train, LabelledImages):
            prepare = settled(prepare, sets.train.files)
            train = training_transform(prepare, augment, self.random)
        return transformed(sets, train, Plain(prepare))

    def inputs(self, sets: Sets, preprocess: Callable[[Any], Tensor] | None, count: int) -> Iterator[Any]:
        """Batches `(N, C, H, W)`, or as `some_inputs` has it."""
        return some_inputs(sets, preprocess or Preprocess(), count, self.at_once, self.forward)

    def fit(self, model: nn.Module, sets: Sets, num_classes: int | None, seed: int) -> Head | None:
        """The last layer; None for a network whose scores no layer is seen to make. Raises OptionError."""
        first = list(spread(sets.train, 1)) or list(spread(sets.train, 64))
        if not first:
            raise DataError("none of the training images that were tried can be read")
        inputs, _ = self.collate(first[:1])
        if self.mixing:
            _check_pictures(inputs, "cutmix" if self.mixing.mixup is None else "mixup")
        device, dtype = device_and_dtype(model)
        if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.dtype != dtype:
            raise DataError(f"the network is {dtype}, its inputs are {inputs.dtype}", hint=Text(FLOAT32, "."))
        try:
            found = find_head(model, on_device(inputs if isinstance(inputs, tuple) else (inputs,), device))
        except OptionError:
            if num_classes is not None:
                raise
            return None
        except (NormswapError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a stranger's forward raises
            what = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"{type(model).__name__} cannot run on the data ({what})", hint=LABELLED) from error
        wanted = num_classes if num_classes is not None else sets.count
        if self.distil and wanted is not None and wanted != found.classes:
            raise OptionError(
                f"the original network gives {found.classes} scores and the new head {wanted}: there is nothing to "
                "distil",
                hint=Text("Leave ", Fix("distil"), " out."),
            )
        if isinstance(sets.train, Tensors) and int(sets.train.labels.max()) >= (wanted or found.classes):
            raise DataError(
                f"there is a label {int(sets.train.labels.max())}, and {wanted or found.classes} scores, for labels "
                "from 0",
                hint=Text(Fix("num_classes", int(sets.train.labels.max()) + 1), " gives the network a new head."),
            )
        return fitted(model, found, sets.count, num_classes, seed)

    def head_parameters(self, model: nn.Module, head: Head | None) -> Collection[str] | None:
        """Those of the last layer."""
        return None if head is None else [n for n, _ in model.named_parameters() if matches(head.path, n)]

    def collate(self, items: Sequence[Any]) -> Any:
        """`(N, *)`, or several arguments of forward, and int64 `(N,)`."""
        return batch_of(items, self.forward)

    def outcome(self, forward: Callable[..., Any], content: Any) -> Outcome:
        """The loss on one batch, and how many are right. Raises DataError for labels without a score."""
        inputs, labels = content
        shares = None
        if self.mixing:
            inputs, shares = self.mixing(inputs)
        output = called(forward, inputs)
        scores = scores_of(output).float()
        check_labels(labels, scores)
        if shares is not None:
            labels = shares @ F.one_hot(labels, scores.shape[1]).to(shares)
        loss = F.cross_entropy(scores, labels, label_smoothing=self.label_smoothing)
        for more in _auxiliary(output):
            if more.shape[1] != scores.shape[1]:
                continue  # of the classes that the network had before it got a new head
            loss = loss + AUXILIARY * F.cross_entropy(more.float(), labels, label_smoothing=self.label_smoothing)
        if self.teacher is not None and self.distil:
            with torch.no_grad():
                wanted = scores_of(called(self.teacher, inputs))
            loss = (1 - self.distil) * loss + self.distil * divergence(wanted.to(scores), scores, TEMPERATURE)
        right = labels if shares is None else labels.argmax(1)
        return Outcome(loss, {"accuracy": (scores.detach().argmax(1) == right).sum()})

    def meter(self) -> Accuracy:
        """Loss and accuracy over a validation set."""
        return Accuracy()

    def draw(self, network: nn.Module, content: Any, path: Path) -> bool:
        """No page of examples."""
        return False


class Accuracy:
    """Mean cross-entropy and share of right answers, exact over any number of processes and uneven parts."""

    def __init__(self) -> None:
        self._right: Any = None
        self._loss = torch.zeros(2, dtype=torch.float64)
        self._answers = Answers()

    def add(self, model: nn.Module, content: Any) -> None:
        """One batch."""
        inputs, labels = content
        scores = scores_of(called(model, inputs)).float()
        check_labels(labels, scores)
        if self._right is None:
            self._right = metric("MulticlassAccuracy", scores.shape[1], average="micro").to(scores.device)
        self._right.update(scores, labels)
        self._answers.add(scores, labels)
        loss = F.cross_entropy(scores, labels, reduction="sum")
        self._loss += torch.tensor([float(loss), len(labels)], dtype=torch.float64)

    def result(self, total: Reduce) -> dict[str, float]:
        """`val_loss` and `val_accuracy`."""
        loss, count = total(self._loss).tolist()
        if not count:
            raise DataError("no validation image could be read")
        right = self._right or metric("MulticlassAccuracy", 1, average="micro")  # of a process without images
        return {"val_loss": loss / count, "val_accuracy": over_all(right, total)}

    def by_class(self, names: Sequence[str]) -> ByClass:
        """The accuracy of each, and what it is taken for."""
        parts = gathered((self._answers.known, self._answers.cells()))
        known = max(known for known, _ in parts)
        return accuracies(summed(cells for _, cells in parts), (*named(range(known), names), "NaN"))


def _check_pictures(inputs: Any, option: str) -> None:
    """Raise OptionError for what cannot be mixed."""
    if not isinstance(inputs, Tensor):
        raise OptionError(Text(Fix(option), " mixes pictures, and the network is given several inputs"))
    if inputs.dim() != 4 or not inputs.is_floating_point():
        what = f"{inputs.dtype} {tuple(inputs.shape[1:])}"
        raise OptionError(Text(Fix(option), f" mixes pictures, float (C, H, W), and the inputs are {what}"))


def _auxiliary(output: Any) -> list[Tensor]:
    """Scores of auxiliary classifiers in the tuples of torchvision's GoogLeNet and Inception."""
    names = [n for n in getattr(output, "_fields", ()) if n.startswith("aux")]
    return [t for n in names if isinstance(t := getattr(output, n), Tensor)]


def check_labels(labels: Tensor, scores: Tensor) -> None:
    """Raise DataError for labels without a score, where looking costs nothing."""
    if labels.device.type != "cpu":
        return  # asking would make the device wait; `fit` has looked at what could be known before
    high = int(labels.max())
    if high >= scores.shape[1]:
        raise DataError(
            f"there is a label {high}, but the network gives {scores.shape[1]} scores, for labels from 0",
            hint=Text(Fix("num_classes", high + 1), " gives it a new head."),
        )
