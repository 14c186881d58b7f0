"""Make one cell: convert, calibrate, and either look at the figure or train."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch import nn

from ..calibration.calibrate import calibrate
from ..calibration.fit import fit_of_some
from ..conversion.convert import convert
from ..conversion.record import record_of
from ..data.preprocess import Preprocess
from ..display.progress import Line
from ..errors import NormswapError, first_line, plural
from ..finetuning.finetune import finetune
from ..finetuning.output.layout import STATE
from ..finetuning.output.report import FinetuneReport, Progress
from ..finetuning.output.report import show as show_run
from ..machine.devices import device_of
from ..modules.restore import moved
from ..norms.registry import identify, norm_named
from ..norms.spec import NormSpec
from .cells import Cell, CellResult
from .conditions import Setting
from .measuring import Measure

Tell = Callable[[Progress], None]


@dataclass
class Maker:
    """Makes cells of one network, which stays as it is. source: what builds it, as files note it.

    measure: for cells that are not trained.
    """

    model: nn.Module
    setting: Setting
    source: Mapping[str, Any] | None = None
    measure: Measure | None = None
    batches: list[Any] | None = None

    def in_turn(self, cells: Sequence[Cell], of: int, bar: Line) -> Generator[CellResult, None, None]:
        """One after the other, in this process. of: how many there are with those that are finished."""
        for number, cell in enumerate(cells, of - len(cells) + 1):
            bar.above(f"{cell.shown} ({number} of {of})")
            yield self.result(cell, lambda now: show_run(bar, now) if not now.validation else None)

    def result(self, cell: Cell, tell: Tell | None = None) -> CellResult:
        """What becomes of a cell, kept in its folder; whatever one norm does to one network is its error."""
        setting = self.setting
        try:
            result = self.make(cell, tell)
        except Exception as error:
            result = CellResult(cell, error=_told(error), figure=setting.figure)
        result.keep(setting.of(cell.name))
        return result

    def make(self, cell: Cell, tell: Tell | None = None) -> CellResult:
        """One cell, from the start or from where it was stopped. Raises what convert, calibrate and finetune raise."""
        begun = time.monotonic()
        made = self._calibrated(cell) if cell.batch_size is None else self._trained(cell, tell)
        return CellResult(cell, **made, figure=self.setting.figure, seconds=round(time.monotonic() - begun, 1))

    def _converted(self, cell: Cell, eps: str | None = None) -> tuple[nn.Module, NormSpec]:
        target = norm_named(cell.norm)
        model = copy.deepcopy(self.model)
        if any(spec is not target for spec in _batch_norms(model)):
            groups = {"groups": cell.groups} if target.takes_groups else {}
            model = convert(model, cell.norm, indivisible="nearest", eps=eps, inplace=True, **cast(Any, groups))
        elif self.source is not None:
            model = convert(model, rules={"*": "keep"}, inplace=True, check=False)  # so that its run can be loaded
        if self.source is not None and (record := record_of(model)) is not None:
            record.source = dict(self.source)
        return model, target

    def _calibrated(self, cell: Cell) -> dict[str, Any]:
        model, target = self._converted(cell, eps="auto")  # as `normswap convert` does
        note = _other_groups(cell, model)
        measure = self.measure or Measure.of(self.model, self.setting, self.inputs())
        found = measure(model)
        best, figures = f"val_{self.setting.figure}", found.figures
        values: dict[str, Any] = {"converted": figures[best], "evaluated": found.images, "note": note}
        if target.per_sample:
            values["images"] = self._calibrate(model)
            figures = measure(model).figures
        return {**values, "score": figures[best], "loss": figures.get("val_loss")}

    def _trained(self, cell: Cell, tell: Tell | None) -> dict[str, Any]:
        setting = self.setting
        folder, conditions = setting.of(cell.name), setting.conditions
        resume = (folder / STATE).is_file()
        model, target = self._converted(cell)
        notes = [_other_groups(cell, model)]
        if target.per_sample and self.far:
            notes.append("not calibrated: the images are not what the network was trained on")
        elif target.per_sample:  # also where it goes on: a run knows its network by what became of it
            self._calibrate(model)
        report: FinetuneReport = finetune(
            model, setting.sets, task=conditions.task, output=folder, batch_size=cast(int, cell.batch_size),
            epochs=conditions.epochs, lr=conditions.lr, optimizer=cast(Any, conditions.optimizer),
            augment=cast(Any, conditions.augment), preprocess=setting.preprocess, device=cast(Any, setting.device),
            workers=setting.workers, seed=conditions.seed, max_bad=setting.max_bad, resume=resume, overwrite=True,
            progress=False if tell is None else tell,
        )  # fmt: skip
        figures = report.figures
        return {
            "score": figures.get(f"val_{setting.figure}"),
            "loss": figures.get("val_loss"),
            "best": report.best,
            "images": report.steps * report.global_batch,
            "evaluated": len(setting.sets.validation),
            "folder": folder,
            "note": "; ".join(filter(None, notes)),
        }

    def _calibrate(self, model: nn.Module) -> int:
        """On the device of the comparison. How many images it took."""
        device = device_of(self.setting.device)
        with moved(self.model, device):
            model.to(device)
            count = calibrate(model, self.model, self.inputs(), progress=False).images
        model.cpu()
        return count

    @cached_property
    def far(self) -> bool:
        """Whether the training images are not what the network was trained on; see `Fit.far`."""
        found = fit_of_some(self.model, self.inputs())
        return found is not None and found.far

    def inputs(self) -> list[Any]:
        """The training images to calibrate on, the same for every cell."""
        if self.batches is None:
            setting = self.setting
            usual = Preprocess() if setting.conditions.task == "classification" else None
            read = setting.task.inputs(setting.sets, setting.preprocess or usual, setting.conditions.images)
            self.batches = list(read)
        return self.batches


def _other_groups(cell: Cell, model: nn.Module) -> str:
    """Which numbers of groups were taken where the one asked for does not divide the channels."""
    record = record_of(model)
    steps = [] if record is None or not isinstance(cell.groups, int) else record.plan.steps
    taken = Counter(getattr(step.options, "num_groups", cell.groups) for step in steps)
    others = ", ".join(
        f"{groups} in {plural(count, 'layer')}" for groups, count in sorted(taken.items()) if groups != cell.groups
    )
    return f"does not divide all channels: {others}" if others else ""


def _told(error: Exception) -> str:
    if isinstance(error, NormswapError):
        return str(error.message).replace("\n", " ")
    return f"{type(error).__name__}: {first_line(error)}"


def _batch_norms(model: nn.Module) -> list[NormSpec]:
    specs = [identify(module) for module in nn.Module.modules(model)]
    return [spec for spec in specs if spec is not None and spec.needs_statistics]
