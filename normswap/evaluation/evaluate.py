"""`normswap.evaluate`: one network on labelled data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import whole
from ..choices import Task as TaskName
from ..data.batches import MAX_BAD, run_on
from ..data.image_folder import spread_over_classes
from ..data.preprocess import Preprocess
from ..display.progress import shown
from ..errors import DataError, Fix, Text
from ..finetuning.datasets.batched import given_batches, loaded
from ..finetuning.datasets.loader import Loaded, Loader, Samples, Skipped
from ..finetuning.datasets.sampler import Key
from ..finetuning.datasets.splits import Sets
from ..finetuning.finetune import task_of
from ..finetuning.tasks.base import Task
from ..finetuning.tasks.detection import Detection
from ..finetuning.tasks.segmentation import Segmentation
from ..heads.dense import find_predictor
from ..modules.restore import evaluating, moved, undisturbed
from ..modules.tree import device_and_dtype
from ..modules.wrappers import check_module, unwrapped
from .labels import Classes
from .meters import Classified, ClassMeter, Detected, Overlapped
from .report import EvaluationReport

AT_ONCE = {"classification": 64, "detection": 4, "segmentation": 4}
"""Images in a batch, where nobody says it."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Any,
    *,
    task: TaskName = "classification",
    class_names: Sequence[str] | None = None,
    images: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    preprocess: Callable[[Any], Tensor] | None = None,
    workers: int | None = None,
    max_bad: int = MAX_BAD,
    progress: Callable[[int, int], None] | bool | None = None,
) -> EvaluationReport:
    """Measure a network on labelled data: accuracy, mAP or mean IoU, for all classes and for each. Leaves it as it was.

    data: what `finetune` takes for the same task: a folder, a Dataset, for classification also a pair of tensors; of a
    folder with `train` and `val` folders, the latter. For classification also a DataLoader, with all that it does, and
    any iterable of batches that `calibrate` takes, if they have labels; they keep their size.
    task: "classification" gives top-1 and top-5 accuracy and what each class is taken for; "detection" COCO's mAP and
    the AP of each class; "segmentation" the mean IoU, that of each class, and what its pixels are taken for.
    class_names: what the network's classes are called, the background included. Where the data has names too, and the
    network knows all of them, they count; folders named by numbers may hold a part of the network's classes; otherwise
    there have to be as many classes, in the same order.
    images: at most so many, the same every time, spread evenly over the classes; of given batches, the first.
    batch_size: by default 64, or 4 with boxes or masks. device: where the network runs (and comes back from), "auto"
    for a GPU if there is one; by default where it is. preprocess: of pictures in files, by default `Preprocess()`;
    detectors do that. workers: processes that read; by default none on a CPU. max_bad: so many unreadable images are
    left out. progress: told how many batches are done, of how many; by default a line on a terminal or in a notebook
    shows it.

    Detection needs the extra `normswap[train]`, and so does segmentation. Raises DataError for data that cannot be used
    or classes that do not fit, and OptionError for a device that is not there or a network that is none for the task.
    """
    whole("batch_size", AT_ONCE.get(task, 1) if batch_size is None else batch_size)
    if images is not None:
        whole("images", images)
    check_module(model)
    model = unwrapped(model)
    doing = task_of(task)
    given = None if isinstance(data, Sets) or task != "classification" else given_batches(data, model, batch_size)
    if given is not None:
        sets = Sets(None, None, given.classes)
    else:
        sets = data if isinstance(data, Sets) else doing.open_one(model, data)
        sets = doing.prepared(sets, preprocess or _usual(task), "none")
    with moved(model, device), evaluating(model), undisturbed(model):
        place, _ = device_and_dtype(model)
        skipped = Skipped(max_bad)
        batches: Iterable[Loaded]
        if given is not None:
            batches, total = loaded(given, images), length_hint(data)  # a DataLoader of a stream has a len that raises
        else:
            samples = Samples(sets.validation, doing.collate, seed=0, replace=False)
            turns = _Turns(sets.validation, images, batch_size or AT_ONCE[task])
            batches = Loader(samples, turns, _workers(workers, place), skipped, pin=place.type == "cuda")
            total = len(turns)
        classes = Classes(sets.classes, None if class_names is None else tuple(class_names), first=task == "detection")
        meter = _meter(doing, model, classes)
        with _classes_as_they_are():
            done = _measured(model, meter, batches, total, progress)
    found = meter.result()
    bad = tuple(str(each) for each in skipped.found.values()) if given is None else given.bad
    notes = tuple(filter(None, [sets.note, found.note]))
    return EvaluationReport(task, done, found.figures, **vars(found.of), notes=notes, bad=bad)


@contextmanager
def _classes_as_they_are() -> Iterator[None]:
    """Checks of labels offer a new head, which training gives; here the network is measured as it is."""
    try:
        yield
    except DataError as error:
        if all(fix.option != "num_classes" for fix in Text(error.hint or "").fixes):
            raise
        hint = (
            "evaluate measures the classes that the network has: number the labels as the network does, and leave out "
            "others.\nA network is given a head for other classes by finetune."
        )
        raise DataError(error.message, hint=hint) from error


def _measured(
    model: nn.Module,
    meter: ClassMeter,
    batches: Iterable[Loaded],
    total: int,
    progress: Callable[[int, int], None] | bool | None,
) -> int:
    """How many images were. Raises DataError where there was none."""
    images = 0
    with shown(progress if isinstance(progress, bool) or progress is None else False, "evaluating") as line:
        tell = progress if callable(progress) else line
        for done, batch in enumerate(_with_images(batches), 1):
            fewer = Text("Try a smaller ", Fix("batch_size"), ".")
            run_on(lambda *content: meter.add(model, content), model, batch.content, fewer=fewer)
            images += batch.count
            if tell is not None:
                tell(done, max(done, total))
    if not images:
        raise DataError("none of the images could be read")
    return images


def _with_images(batches: Iterable[Loaded]) -> Iterator[Loaded]:
    return (batch for batch in batches if batch.count)


def _usual(task: str) -> Preprocess | None:
    """Detectors prepare their images themselves."""
    return None if task == "detection" else Preprocess()


def _meter(task: Task, model: nn.Module, classes: Classes) -> ClassMeter:
    """With what the task's checks of the data have to know of the network."""
    if not isinstance(task, (Detection, Segmentation)):
        return Classified(classes)
    found = find_predictor(model)
    if found is not None and (found[0] == "") == isinstance(task, Segmentation):
        task.classes = found[1]
    return Overlapped(classes) if isinstance(task, Segmentation) else Detected(classes, task.classes)


class _Turns:
    """Batches of the samples to read, each once."""

    def __init__(self, source: Any, most: int | None, size: int) -> None:
        labels = getattr(source, "labels", None)
        labels = labels.tolist() if isinstance(labels, Tensor) else labels
        known = isinstance(labels, (tuple, list)) and all(isinstance(label, int) for label in labels)
        self._order = spread_over_classes(labels if known and labels else [0] * len(source), most)
        self._size = size

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self._order), self._size):
            yield [(0, index) for index in self._order[start : start + self._size]]


def _workers(asked: int | None, place: torch.device) -> int:
    """As in fine-tuning: on a CPU the network takes all of it."""
    if asked is not None:
        return asked
    return 0 if place.type == "cpu" else min(8, os.cpu_count() or 1)
