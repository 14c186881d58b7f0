"""Make one cell: convert, calibrate, and either look at the accuracy or train."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..calibration.calibrate import calibrate
from ..conversion.convert import convert
from ..conversion.record import record_of
from ..data.preprocess import Preprocess
from ..errors import DataError
from ..finetuning.datasets.loader import Loader, Samples, Skipped
from ..finetuning.datasets.sampler import ValidationSampler
from ..finetuning.finetune import finetune
from ..finetuning.output.layout import STATE
from ..finetuning.output.report import FinetuneReport, Progress
from ..finetuning.tasks.base import on_device
from ..finetuning.tasks.classification import Classification
from ..heads.classifier import find_head
from ..machine.devices import device_of
from ..modules.restore import evaluating, undisturbed
from ..norms.registry import identify, norm_named
from ..norms.spec import NormSpec
from .cells import Cell, CellResult
from .conditions import Setting

Tell = Callable[[Progress], None]


@dataclass
class Maker:
    """Makes cells of one network, which stays as it is. source: what builds it, as files note it."""

    model: nn.Module
    setting: Setting
    source: Mapping[str, Any] | None = None
    batches: list[Any] | None = None

    def make(self, cell: Cell, tell: Tell) -> CellResult:
        """One cell, from the start or from where it was stopped. Raises what convert, calibrate and finetune raise."""
        begun = time.monotonic()
        result = self._calibrated(cell) if cell.batch_size is None else self._trained(cell, tell)
        return CellResult(cell, **result, seconds=round(time.monotonic() - begun, 1))

    def _converted(self, cell: Cell) -> tuple[nn.Module, NormSpec]:
        target = norm_named(cell.norm)
        model = copy.deepcopy(self.model)
        if any(spec is not target for spec in _batch_norms(model)):
            groups = {"groups": cell.groups} if target.takes_groups else {}
            model = convert(model, cell.norm, indivisible="nearest", inplace=True, **cast(Any, groups))
        elif self.source is not None:
            model = convert(model, rules={"*": "keep"}, inplace=True, check=False)  # so that its run can be loaded
        if self.source is not None and (record := record_of(model)) is not None:
            record.source = dict(self.source)
        return model, target

    def _calibrated(self, cell: Cell) -> dict[str, Any]:
        model, target = self._converted(cell)
        figures = self.evaluate(model)
        found: dict[str, Any] = {"converted": figures["val_accuracy"]}
        if target.per_sample:
            found["images"] = calibrate(model, self.model, self.inputs(), progress=False).images
            figures = self.evaluate(model)
        return {**found, "accuracy": figures["val_accuracy"], "loss": figures["val_loss"]}

    def _trained(self, cell: Cell, tell: Tell) -> dict[str, Any]:
        folder, conditions = self.setting.of(cell.name), self.setting.conditions
        resume = (folder / STATE).is_file()
        model, target = self._converted(cell)
        if target.per_sample:  # also where it goes on: a run knows its network by what became of it
            calibrate(model, self.model, self.inputs(), progress=False)
        report: FinetuneReport = finetune(
            model, self.setting.sets, output=folder, batch_size=cast(int, cell.batch_size), epochs=conditions.epochs,
            lr=conditions.lr, optimizer=cast(Any, conditions.optimizer), augment=cast(Any, conditions.augment),
            preprocess=self.setting.preprocess, device=cast(Any, self.setting.device), workers=self.setting.workers,
            seed=conditions.seed, max_bad=self.setting.max_bad, resume=resume, overwrite=True, progress=tell,
        )  # fmt: skip
        figures = report.figures
        return {
            "accuracy": figures.get("val_accuracy"),
            "loss": figures.get("val_loss"),
            "best": report.best,
            "images": report.steps * report.global_batch,
            "folder": folder,
        }

    def inputs(self) -> list[Any]:
        """The training images to calibrate on, the same for every cell."""
        if self.batches is None:
            setting = self.setting
            read = Classification().inputs(setting.sets, setting.preprocess or Preprocess(), setting.conditions.images)
            self.batches = list(read)
        return self.batches

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`val_accuracy` and `val_loss` on the validation images."""
        setting, task = self.setting, Classification()
        sets = task.prepared(setting.sets, setting.preprocess, "none")
        samples = Samples(sets.validation, task.collate, seed=setting.conditions.seed, replace=False)
        sampler = ValidationSampler(len(sets.validation), task.at_once)
        meter, device = task.meter(), device_of(setting.device)
        with undisturbed(model), evaluating(model):
            model.to(device)
            for batch in Loader(samples, sampler, 0, Skipped(setting.max_bad), pin=False):
                if batch.count:
                    meter.add(model, on_device(batch.content, device))
            model.cpu()
        return meter.result(partial(torch.clone))


def check_classes(model: nn.Module, setting: Setting, inputs: list[Any]) -> None:
    """Raise DataError where the data has other classes than the network, so that it has no accuracy untrained."""
    classes = setting.sets.count
    known = find_head(model, (inputs[0],)).classes
    if classes is not None and classes != known:
        raise DataError(
            f"the data has {classes} classes and the network tells {known} apart, so that it has no accuracy untrained",
            hint="Batch sizes have each cell trained, with a head for these classes.",
        )


def _batch_norms(model: nn.Module) -> list[NormSpec]:
    specs = [identify(module) for module in nn.Module.modules(model)]
    return [spec for spec in specs if spec is not None and spec.needs_statistics]
