"""`normswap evaluate`: one network on labelled data."""

from __future__ import annotations

import json as json_text
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...choices import TASKS
from ...errors import OutputError
from ...machine.limits import check_workers
from ..arguments import options
from ..arguments.class_names import class_names
from ..arguments.datasets import DataPlace
from ..arguments.networks import ResolvedSource, SourceRequest, files_read, locate, open_network
from ..arguments.preprocessing import Preparation, PreprocessOverrides, prepare
from ..terminal import flags
from ..terminal.errors import WRITTEN, BelowLimit
from ..terminal.output import reporting
from ._classes import show_classes

if TYPE_CHECKING:
    from ...evaluation.report import EvaluationReport
    from ..terminal.render import Page

_WORST = 10
_SUFFIXES = (".json", ".csv", ".png")


def evaluate(
    ctx: typer.Context,
    source: options.Source,
    data: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|torchvision:NAME",
            help="Labelled data as --task has it, or a data set of torchvision; of train and val folders, the latter.",
            show_default=False,
        ),
    ],
    task: Annotated[
        str,
        options.word(
            TASKS, "One subfolder for each class; boxes of COCO, YOLO or Pascal VOC; or a mask beside each image."
        ),
    ] = "classification",
    annotations: options.Annotations = None,
    images: options.Images = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Images in a batch.", show_default="64, or 4 with boxes or masks"),
    ] = None,
    size: options.Size = None,
    mean: options.Mean = None,
    std: options.Std = None,
    max_bad: options.MaxBad = 10,
    data_root: options.DataRoot = Path("data"),
    download: options.Download = False,
    weights: options.Weights = None,
    arg: options.Arg = None,
    show_all: Annotated[bool, typer.Option("--all", help="Every class, in order, instead of the worst ten.")] = False,
    fail_below: options.FailBelow = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Write all figures to a .json file, or the confusion matrix to a .csv or .png file.",
            show_default=False,
        ),
    ] = None,
    force: options.Force = False,
    report: options.Report = None,
    device: options.Device = "auto",
    workers: options.Workers = None,
    built_by: options.BuiltBy = None,
    trust_pickle: options.TrustPickle = False,
    trust_code: options.TrustCode = False,
    allow_nonfinite: options.AllowNonfinite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure a network on labelled images: accuracy, mAP or mean IoU, for all classes together and for each.

    --task classification gives top-1 and top-5 accuracy and what each class is taken for, detection COCO's mAP,
    segmentation the mean IoU. Classes that have names in the data and in the published weights are matched by name;
    else the data needs the network's classes in the network's order. --fail-below is about the first figure.

    \b
    normswap evaluate resnet50-gn.safetensors --data photos/val
    normswap evaluate resnet50-gn.safetensors --data photos/val --fail-below 0.75 -o accuracy.json
    normswap evaluate fasterrcnn_resnet50_fpn --task detection --data val2017/ --annotations instances_val2017.json
    """
    place = DataPlace.single(ctx, task, data, annotations, data_root, download)
    asked = PreprocessOverrides.of(ctx)
    wanted = SourceRequest.of(ctx, source)
    words: Any = {"task": task, "device": device}
    with reporting(ctx) as out:
        if workers is not None:
            check_workers(workers)
        out.step("loading PyTorch")
        from ...evaluation.evaluate import evaluate as measure
        from ...finetuning.finetune import task_of

        origin = locate(ctx, wanted)
        if output is not None:
            _check_output(
                output, task, force, [*files_read((origin, wanted)), *filter(None, [annotations]), Path(data)]
            )
        model, origin = open_network(origin, wanted, out)
        sets = place.open_one(task_of(task), model)
        preparation = None if task == "detection" else prepare(model, origin, asked)
        if task == "classification" and preparation is not None:
            preparation = preparation.settled(getattr(sets.validation, "files", ()))
        with out.bar("evaluating") as bar:
            found = measure(
                model, sets, **words, class_names=class_names(model, origin), images=images, batch_size=batch_size,
                preprocess=None if preparation is None else preparation.transform, workers=workers, max_bad=max_bad,
                progress=bar,
            )  # fmt: skip
        values = _values(found, origin, preparation, data)
        if output is not None:
            _write(found, values, output)
            ctx.meta[WRITTEN] = output
        out.show(lambda: values, lambda page: _page(page, found, origin, preparation, data, show_all, output))
        if fail_below is not None and found.score[1] < fail_below:
            raise BelowLimit(*found.score, fail_below)


def _check_output(output: Path, task: str, force: bool, inputs: list[Path]) -> None:
    """Before any work is done."""
    from ...evaluation.matrix import check_matrix
    from ...files.writing import check_writable

    if output.suffix.lower() not in _SUFFIXES and not output.is_dir():
        raise OutputError(
            f"{output} is not a name for what evaluate writes", hint=f"Let it end in {', '.join(_SUFFIXES)}."
        )
    check_writable(output, overwrite=force, inputs=inputs)
    if output.suffix.lower() != ".json":
        check_matrix(task, output)


def _write(report: EvaluationReport, values: Mapping[str, Any], output: Path) -> None:
    from ...evaluation.matrix import write_csv, write_picture
    from ...files.writing import atomic

    if output.suffix.lower() == ".csv":
        write_csv(report, output)
    elif output.suffix.lower() == ".png":
        write_picture(report, output)
    else:
        with atomic(output) as temporary:
            temporary.write_text(json_text.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _values(
    report: EvaluationReport, origin: ResolvedSource, preparation: Preparation | None, data: str
) -> dict[str, Any]:
    return {
        "network": origin.to_dict(),
        "data": data,
        "preprocess": None if preparation is None else preparation.to_dict(),
        **report.to_dict(),
    }


def _page(
    page: Page,
    report: EvaluationReport,
    origin: ResolvedSource,
    preparation: Preparation | None,
    data: str,
    show_all: bool,
    output: Path | None,
) -> None:
    from ...errors import plural
    from ...evaluation.report import FIGURES

    read = f"{data}: {plural(report.images, 'image')}"
    page.facts(
        ("network", origin.told),
        ("data", read if preparation is None else f"{read}; {preparation}"),
        *((FIGURES[name], f"{value:.4f}") for name, value in report.figures.items()),
        indent=0,
    )
    hidden = show_classes(page, report, None if show_all else _WORST)
    if hidden > 0:
        page.line((f"{hidden} more class{'es' * (hidden != 1)}; --all shows every one in order", "dim"))
    for note in report.notes:
        page.line(("note: ", "dim"), flags.told(note))
    page.skipped(report.bad)
    if output is not None:
        page.line(("Written: ", "strong"), (str(output), "path"))
