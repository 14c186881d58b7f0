"""The data that `normswap finetune` trains on, as its options name it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from . import options

if TYPE_CHECKING:
    from torch import nn

    from ...finetuning.datasets.splits import Sets
    from ...finetuning.tasks.base import Task

TORCHVISION = "torchvision:"


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

    def check(self, ctx: typer.Context) -> None:
        """Raise a usage error for options that do not go together."""
        if self.task != "detection" and (self.annotations or self.eval_annotations):
            raise options.usage(ctx, "--annotations and --eval-annotations go with --task detection")
        if self.eval_annotations and not self.annotations:
            raise options.usage(ctx, "--eval-annotations goes with --annotations")
        if self.data.startswith(TORCHVISION) and (self.task != "classification" or self.evaluation):
            raise options.usage(ctx, f"--data {TORCHVISION}NAME goes with --task classification, without --eval-data")

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
