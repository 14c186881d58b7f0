"""The data that `normswap finetune` trains on and `normswap evaluate` measures on, as their options name it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ...errors import DataError
from . import options

if TYPE_CHECKING:
    from torch import nn

    from ...data.image_folder import ImageData
    from ...finetuning.datasets.splits import Sets
    from ...finetuning.tasks.base import Task
    from ..terminal.output import Output

TORCHVISION = "torchvision:"


def images_in(place: Path, out: Output, *, limit: int | None, train: bool) -> ImageData:
    """The images of a folder; of one that holds the parts of a data set, those to train on or to validate on.

    Raises DataError.
    """
    from ...data.image_folder import open_images
    from ...finetuning.datasets.splits import TRAIN, VALIDATION, part_of

    try:
        return open_images(place, limit=limit)
    except DataError:
        part = part_of(place, TRAIN if train else VALIDATION)
        if part is None:
            raise
        found = open_images(part, limit=limit)
        out.note(f"{place} holds parts of a data set; {part} is taken")
        return found


@dataclass(frozen=True)
class DataPlace:
    """Where the data is, as the options say."""

    task: str
    data: str
    evaluation: Path | None
    annotations: Path | None
    eval_annotations: Path | None
    root: Path
    download: bool

    @classmethod
    def single(
        cls, ctx: typer.Context, task: str, data: str, annotations: Path | None, root: Path, download: bool
    ) -> DataPlace:
        """A place without a part for validation. Raises a usage error for options that do not go together."""
        if task != "detection" and annotations:
            raise options.usage(ctx, "--annotations goes with --task detection")
        place = cls(task, data, None, annotations, None, root, download)
        place.check(ctx)
        return place

    def check(self, ctx: typer.Context) -> None:
        """Raise a usage error for options that do not go together."""
        if self.task != "detection" and (self.annotations or self.eval_annotations):
            raise options.usage(ctx, "--annotations and --eval-annotations go with --task detection")
        if self.eval_annotations and not self.annotations:
            raise options.usage(ctx, "--eval-annotations goes with --annotations")
        if self.data.startswith(TORCHVISION) and (self.task != "classification" or self.evaluation):
            alone = ", without --eval-data" if self.evaluation else ""
            raise options.usage(ctx, f"--data {TORCHVISION}NAME goes with --task classification{alone}")

    def open_one(self, task: Task, model: nn.Module) -> Sets:
        """One set to measure on. Raises DataError for what cannot be used."""
        if self.data.startswith(TORCHVISION):
            from ...finetuning.datasets.splits import held_out

            return held_out(self.open(task, model, 0))
        data: Any = self.data
        if self.annotations is not None:
            from ...data.coco import open_coco
            from ...finetuning.tasks.detection import predicts_masks

            data = open_coco(self.annotations, data, masks=predicts_masks(model))
        return task.open_one(model, data)

    def open(self, task: Task, model: nn.Module, seed: int) -> Sets:
        """The data sets. Raises DataError for what cannot be used."""
        if self.data.startswith(TORCHVISION):
            from ...finetuning.datasets.torchvision_named import from_torchvision

            return from_torchvision(self.data[len(TORCHVISION) :], self.root, download=self.download, seed=seed)
        if self.annotations is None:
            return task.open(model, self.data, self.evaluation, seed=seed)
        from ...data.coco import open_coco
        from ...finetuning.tasks.detection import predicts_masks

        masks, evaluation = predicts_masks(model), self.evaluation
        first = open_coco(self.annotations, self.data, masks=masks)
        if self.eval_annotations is None:
            return task.open(model, first, evaluation, seed=seed)
        second = open_coco(self.eval_annotations, evaluation or self.data, masks=masks)
        return task.open(model, first, second, seed=seed)
