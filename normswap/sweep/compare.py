"""`normswap.compare`: a network and data -> the same run for every norm, number of groups and batch size."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

from torch import Tensor, nn

from ..choices import Augment, Device, Optimizer
from ..choices import Task as TaskName
from ..display.progress import Line, Silent, shown
from ..errors import DataError, Fix, Interrupted, OptionError, OutputError, Text
from ..files.locking import locked
from ..finetuning.asked import EPOCHS
from ..finetuning.datasets.splits import Sets
from ..finetuning.finetune import task_of
from ..finetuning.output.layout import check_outside
from ..modules.wrappers import check_module, unwrapped
from ..sources.weights import digest_of
from .cells import GROUPS, Cell, cells_kept, cells_of, joined, kept_results
from .conditions import CONDITIONS, Conditions, Setting
from .making import Maker
from .measuring import Measure
from .parallel import check_devices, in_parallel
from .pictures import draw
from .report import ComparisonReport, write_tables

NORMS = ("bn", "gn")
TRAINED_NORMS = ("bn", "frozen", "gn")
TRAINED_GROUPS = ("auto",)
IMAGES = {"classification": 256, "detection": 32, "segmentation": 32}
"""How many to calibrate on, where nobody says it."""


def compare(
    model: nn.Module,
    data: Any,
    eval_data: Any = None,
    *,
    task: TaskName = "classification",
    output: str | Path,
    norms: Sequence[str] | None = None,
    groups: Sequence[int | str] | None = None,
    batch_sizes: Sequence[int] = (),
    epochs: int | None = None,
    lr: float | None = None,
    optimizer: Optimizer = "adamw",
    augment: Augment = "auto",
    images: int | None = None,
    class_names: Sequence[str] | None = None,
    preprocess: Callable[[Any], Tensor] | None = None,
    device: Device = "auto",
    devices: Sequence[str] | None = None,
    workers: int | None = None,
    seed: int = 0,
    max_bad: int = 10,
    overwrite: bool = False,
    title: str = "",
    source: Mapping[str, Any] | None = None,
    progress: bool | Line | None = None,
) -> ComparisonReport:
    """Compare norms, numbers of groups and batch sizes under equal conditions: seed, order of the data, images seen.

    Without batch_sizes each cell is converted and calibrated on `images` of the training images, and what counts is its
    figure on the validation images, for 1 to 32 groups: minutes on a small network. With batch_sizes each cell is
    a run of `finetune` besides, for `epochs` (default 10), whose folder lies in `output/cells`.

    data, eval_data: what `finetune` takes for the same task. task: "classification" compares accuracies, "detection"
    mAP, "segmentation" the mean IoU. images: by default 256, or 32 with boxes or masks. class_names: what the network's
    classes are called, as in `evaluate`, for cells that are not trained.
    norms: by default bn and gn, and frozen where cells are trained.
    groups: of norms that take any; the nearest divisor below where channels do not divide, which `note` then says.
    title: of the pictures. source: what builds the network, as the files of the runs note it; by default what can be
    found out.
    devices: such as `["cuda:0", "cuda:1"]`, makes cells in as many processes at once, one on each; network and data
    have to be such as can be pickled. The table is the same as that of one process, up to how the device rounds. By
    default one cell after the other, in this process, on `device`.

    Writes to `output` table.csv, table.json and table.md after every cell, and pictures at the end. Cells that are
    finished there are not made again, a training that was stopped goes on, a failed cell is tried again; cells may be
    added, under the same conditions, and those of before stay in the tables. overwrite: begin anew. A cell that fails
    has its error in the table, and the others go on. Ctrl-C keeps finished cells, and raises `Interrupted` with a
    report of them. The network stays as it is.

    Raises OptionError for options that make no sense, a device that is not there, or a folder with other conditions,
    DataError for data that cannot be used, OutputError for a folder that cannot be written.
    """
    sizes, folder = tuple(batch_sizes), Path(output)
    usual = (TRAINED_NORMS, TRAINED_GROUPS) if sizes else (NORMS, GROUPS)
    cells = cells_of(usual[0] if norms is None else norms, usual[1] if groups is None else groups, sizes)
    if not sizes and (epochs is not None or lr is not None):
        what = Fix("epochs" if epochs is not None else "lr")
        raise OptionError(Text(what, " is of training, and without ", Fix("batch_sizes"), " nothing is trained"))
    if devices is None and ":" in device:
        devices = (device,)  # of several GPUs, one that a process of its own takes for the only one
    check_devices((device,) if devices is None else devices)
    doing = task_of(task)
    usual_epochs = EPOCHS if sizes and epochs is None else epochs
    count = IMAGES.get(task, 1) if images is None else images
    conditions = Conditions(seed, count, usual_epochs, lr, optimizer, augment, task=task)
    check_module(model)
    model = unwrapped(model)
    sets = data if isinstance(data, Sets) else doing.open(model, data, eval_data, seed=seed)
    if sets.validation is None:
        raise DataError("there are no validation images to compare on", hint="Give labelled images to validate on.")
    check_outside(folder, (getattr(part, "folder", None) for part in (sets.train, sets.validation)))
    names = None if class_names is None else tuple(class_names)
    setting = Setting(conditions, sets, folder, preprocess, device, workers, max_bad, names)
    setting = setting.with_digests(digest_of(model.state_dict()))
    maker = Maker(model, setting, source)
    if not sizes:
        maker.measure = Measure.of(model, setting, maker.inputs())
    _make_folder(folder)
    with locked(folder), _told(progress) as bar:
        setting.conditions.keep(folder, overwrite=overwrite)
        if overwrite:
            rmtree(setting.of(""), ignore_errors=True)
        return _made(joined(cells, cells_kept(setting.of(""))), maker, title, bar, devices)


def _made(
    cells: Sequence[Cell], maker: Maker, title: str, bar: Line, devices: Sequence[str] | None
) -> ComparisonReport:
    """All cells, those that were finished before as they are."""
    setting = maker.setting
    kept = {result.cell: result for result in kept_results(cells, setting.of(""))}
    notes = tuple(filter(None, [setting.sets.note, "" if maker.measure is None else maker.measure.note]))
    report = ComparisonReport((), setting.folder, len(cells), figure=setting.figure, notes=notes)

    def now() -> ComparisonReport:
        return replace(report, results=tuple(kept[cell] for cell in cells if cell in kept))

    todo = [cell for cell in cells if cell not in kept]
    if devices is None:
        results = maker.in_turn(todo, len(cells), bar)
    else:
        results = in_parallel(maker, todo, len(cells), bar, devices)
    try:
        with closing(results):
            for result in results:
                kept[result.cell] = result
                write_tables(now())
                if devices is not None:
                    bar(len(kept), len(cells))
    except KeyboardInterrupt as stop:
        kept |= {result.cell: result for result in kept_results(cells, setting.of(""))}
        raise Interrupted(_write(replace(now(), interrupted=True), title)) from stop
    return _write(now(), title)


def _make_folder(folder: Path) -> None:
    if folder.is_file():
        raise OutputError(f"{folder} is a file", hint=Text(Fix("output"), " takes a folder."))
    if folder.is_dir() and not (folder / CONDITIONS).exists() and any(f.suffix != ".lock" for f in folder.iterdir()):
        own = Text(Fix("output"), " takes a new folder, or one of this command's own.")
        raise OutputError(f"{folder} holds other files", hint=own)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be used: {error.strerror or error}") from error


def _write(report: ComparisonReport, title: str) -> ComparisonReport:
    """The tables and pictures of what there is by now."""
    report = replace(report, pictures=draw(report.results, report.folder, title, report.told))
    write_tables(report)
    return report


@contextmanager
def _told(progress: bool | Line | None) -> Iterator[Line]:
    if isinstance(progress, Line):
        yield progress
        return
    with shown(progress, "comparing") as line:
        yield line or Silent("comparing", sys.stderr)
