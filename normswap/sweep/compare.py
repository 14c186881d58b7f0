"""`normswap.compare`: a network and data -> the same run for every norm, number of groups and batch size."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

from torch import Tensor, nn

from ..choices import Augment, Device, Optimizer
from ..display.progress import Line, Silent, shown
from ..errors import DataError, Fix, Interrupted, NormswapError, OptionError, OutputError, Text, first_line
from ..files.locking import locked
from ..finetuning.asked import EPOCHS
from ..finetuning.output.layout import check_outside
from ..finetuning.output.report import show as show_run
from ..finetuning.tasks.classification import Classification
from ..modules.wrappers import check_module, unwrapped
from ..sources.weights import digest_of
from .cells import GROUPS, Cell, CellResult, cells_of, kept_results
from .conditions import CONDITIONS, Conditions, Setting
from .making import Maker, check_classes
from .pictures import draw
from .report import ComparisonReport, write_tables

NORMS = ("bn", "gn")
TRAINED_NORMS = ("bn", "frozen", "gn")
TRAINED_GROUPS = ("auto",)


def compare(
    model: nn.Module,
    data: Any,
    eval_data: Any = None,
    *,
    output: str | Path,
    norms: Sequence[str] | None = None,
    groups: Sequence[int | str] | None = None,
    batch_sizes: Sequence[int] = (),
    epochs: int | None = None,
    lr: float | None = None,
    optimizer: Optimizer = "adamw",
    augment: Augment = "auto",
    images: int = 256,
    preprocess: Callable[[Any], Tensor] | None = None,
    device: Device = "auto",
    workers: int | None = None,
    seed: int = 0,
    max_bad: int = 10,
    overwrite: bool = False,
    title: str = "",
    source: Mapping[str, Any] | None = None,
    progress: bool | Line | None = None,
) -> ComparisonReport:
    """Compare norms, numbers of groups and batch sizes under equal conditions: seed, order of the data, images seen.

    Without batch_sizes each cell is converted and calibrated on `images` of the training images, and its accuracy on
    the validation images is what counts, for 1 to 32 groups: minutes on a small network. With batch_sizes each cell is
    a run of `finetune` besides, for `epochs` (default 10), whose folder lies in `output/cells`.

    data, eval_data: labelled images, as in `finetune`. norms: by default bn and gn, and frozen where cells are trained.
    groups: of norms that take any; the nearest divisor below where channels do not divide. title: of the pictures.
    source: what builds the network, as the files of the runs note it; by default what can be found out.

    Writes to `output` table.csv, table.json and table.md after every cell, and pictures at the end. Cells that are
    finished there are not made again, a training that was stopped goes on, a failed cell is tried again; cells may be
    added, under the same conditions. overwrite: begin anew. A cell that fails has its error in the table, and the
    others go on. Ctrl-C keeps finished cells, and raises `Interrupted` with a report of them. The network stays as it
    is.

    Raises OptionError for options that make no sense or a folder with other conditions, DataError for data that cannot
    be used, OutputError for a folder that cannot be written.
    """
    sizes, folder = tuple(batch_sizes), Path(output)
    usual = (TRAINED_NORMS, TRAINED_GROUPS) if sizes else (NORMS, GROUPS)
    cells = cells_of(usual[0] if norms is None else norms, usual[1] if groups is None else groups, sizes)
    if not sizes and (epochs is not None or lr is not None):
        what = Fix("epochs" if epochs is not None else "lr")
        raise OptionError(Text(what, " is of training, and without ", Fix("batch_sizes"), " nothing is trained"))
    usual_epochs = EPOCHS if sizes and epochs is None else epochs
    conditions = Conditions(seed, images, usual_epochs, lr, optimizer, augment)
    check_module(model)
    model = unwrapped(model)
    sets = Classification().open(model, data, eval_data, seed=seed)
    if sets.validation is None:
        raise DataError("there are no validation images to compare on", hint="Give labelled images to validate on.")
    check_outside(folder, (getattr(part, "folder", None) for part in (sets.train, sets.validation)))
    setting = Setting(conditions, sets, folder, preprocess, device, workers, max_bad)
    setting = setting.with_digests(digest_of(model.state_dict()))
    maker = Maker(model, setting, source)
    if not sizes:
        check_classes(model, setting, maker.inputs())
    _make_folder(folder)
    with locked(folder), _told(progress) as bar:
        setting.conditions.keep(folder, overwrite=overwrite)
        if overwrite:
            rmtree(setting.of(""), ignore_errors=True)
        return _made(cells, maker, title, bar)


def _made(cells: Sequence[Cell], maker: Maker, title: str, bar: Line) -> ComparisonReport:
    """All cells, those that were finished before as they are."""
    setting = maker.setting
    kept = {result.cell: result for result in kept_results(cells, setting.of(""))}
    report = ComparisonReport(tuple(kept[cell] for cell in cells if cell in kept), setting.folder, len(cells))
    for cell in cells:
        if cell in kept:
            continue
        bar.above(f"{cell.shown} ({len(kept) + 1} of {len(cells)})")
        try:
            result = maker.make(cell, lambda now: show_run(bar, now) if not now.validation else None)
        except KeyboardInterrupt as stop:
            raise Interrupted(_write(replace(report, interrupted=True), title)) from stop
        except Exception as error:  # whatever one norm does to one network, the others are to be seen
            result = CellResult(cell, error=_told_error(error))
        kept[cell] = result
        result.keep(setting.of(cell.name))
        report = replace(report, results=tuple(kept[cell] for cell in cells if cell in kept))
        write_tables(report)
    return _write(report, title)


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


def _told_error(error: Exception) -> str:
    if isinstance(error, NormswapError):
        return str(error.message).replace("\n", " ")
    return f"{type(error).__name__}: {first_line(error)}"


def _write(report: ComparisonReport, title: str) -> ComparisonReport:
    """The tables and pictures of what there is by now."""
    report = replace(report, pictures=draw(report.results, report.folder, title))
    write_tables(report)
    return report


@contextmanager
def _told(progress: bool | Line | None) -> Iterator[Line]:
    if isinstance(progress, Line):
        yield progress
        return
    with shown(progress, "comparing") as line:
        yield line or Silent("comparing", sys.stderr)
