"""What a cell's network is worth on the validation images, as its task counts it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, Fix, Text
from ..evaluation.labels import Classes
from ..evaluation.report import FIGURES
from ..finetuning.datasets.loader import Loader, Samples, Skipped
from ..finetuning.datasets.sampler import ValidationSampler
from ..finetuning.tasks.base import Task, on_device
from ..finetuning.tasks.detection import Detection
from ..finetuning.tasks.segmentation import Segmentation
from ..heads.classifier import find_head
from ..heads.dense import find_predictor
from ..machine.devices import device_of
from ..modules.restore import evaluating, undisturbed
from .conditions import Setting


@dataclass(frozen=True)
class Measured:
    """figures: `val_` ones, as the task names them. images: that they rest on, less those that could not be read."""

    figures: dict[str, float]
    images: int


@dataclass(frozen=True)
class Measure:
    """Measures networks that tell `known` classes apart; None where that is not known. Makes no head for others."""

    setting: Setting
    known: int | None

    @classmethod
    def of(cls, model: nn.Module, setting: Setting, inputs: list[Any]) -> Measure:
        """For what becomes of this network. inputs: of the training images, one at least.

        Raises DataError where the data has other classes than the network, so that it has no figure untrained.
        """
        known = _classes(model, setting.task, inputs)
        found = cls(setting, known)
        if not found._fits():
            count, first = len(setting.sets.classes or ()), found._classes().first
            what = "accuracy" if setting.figure == "accuracy" else f"{FIGURES[setting.figure]} of its own"
            raise DataError(
                f"the data has {count} classes and the network tells {(known or 0) - first} apart, so that it has no "
                f"{what} untrained",
                hint=Text(Fix("batch_sizes"), " has each cell trained, with a head for these classes."),
            )
        return found

    def _fits(self) -> bool:
        """Whether each class of the data is one of the network's."""
        count = self.setting.sets.count
        if self.known is None or count is None:
            return True
        if isinstance(self.setting.task, Segmentation):  # a class that no mask shows is missed by nobody
            return count <= self.known
        try:
            self.numbered(torch.zeros(0, dtype=torch.int64))
        except DataError:
            return False
        return True

    def _classes(self) -> Classes:
        setting = self.setting
        return Classes(setting.sets.classes, setting.class_names, first=setting.conditions.task == "detection")

    @property
    def note(self) -> str:
        """How the classes of the data were found in the network's; empty where there is nothing to say of it."""
        return (
            ""
            if self.known is None or isinstance(self.setting.task, Segmentation)
            else self._classes().note(self.known)
        )

    def numbered(self, labels: Tensor) -> Tensor:
        """The data's labels as the network numbers them. Raises DataError where that is unclear."""
        return labels if self.known is None else self._classes().numbered(labels, self.known)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Measured:
        """On all validation images. The network is on the CPU afterwards."""
        setting, task = self.setting, self.setting.task
        if isinstance(task, (Detection, Segmentation)):
            task.classes = self.known
        sets = task.prepared(setting.sets, setting.preprocess, "none")
        samples = Samples(sets.validation, task.collate, seed=setting.conditions.seed, replace=False)
        sampler = ValidationSampler(len(sets.validation), task.at_once)
        meter, device, images = task.meter(), device_of(setting.device), 0
        with undisturbed(model), evaluating(model):
            model.to(device)
            for batch in Loader(samples, sampler, 0, Skipped(setting.max_bad), pin=False):
                if batch.count:
                    images += batch.count
                    meter.add(model, on_device(self._renumbered(task, batch.content), device))
            model.cpu()
        return Measured(meter.result(partial(torch.clone)), images)

    def _renumbered(self, task: Task, content: Any) -> Any:
        if isinstance(task, Segmentation):  # whose masks hold the network's numbers
            return content
        inputs, labels = content
        if isinstance(task, Detection):
            return inputs, [{**target, "labels": self.numbered(target["labels"])} for target in labels]
        return inputs, self.numbered(labels)


def _classes(model: nn.Module, task: Task, inputs: list[Any]) -> int | None:
    """How many the network tells apart, with the background of a detector."""
    if not isinstance(task, (Detection, Segmentation)):
        return find_head(model, (inputs[0],)).classes
    found = find_predictor(model)
    return found[1] if found is not None and (found[0] == "") == isinstance(task, Segmentation) else None
