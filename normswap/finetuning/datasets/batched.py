"""Samples and batches of any form, with labels, for classifiers that take other things than one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset, SubsetRandomSampler
from torch.utils.data._utils.collate import default_collate, default_convert
from torch.utils.data.distributed import DistributedSampler

from ...data.batches import Batches, as_batches, is_pair, rows, stacked
from ...data.one_batch import Taker, images_in, split
from ...errors import DataError, Fix, Text, plural
from .collate import collate
from .loader import Loaded, Tensors

LABELLED = (
    "finetune and evaluate take what calibrate takes, with one class for each sample: (x, y), (x, lengths, y), "
    "((x, lengths), y), or a dict with 'labels'. A network that learns something else is trained in a loop of your "
    "own, within normswap.stabilized(model); see docs/finetuning.md."
)
_OWN_BATCHES = (
    "Give a Dataset of samples, TensorDataset(x, lengths, y) say, or a DataLoader with the collate_fn that pads them; "
    "or go through the batches in a loop of your own, within normswap.stabilized(model); see docs/finetuning.md."
)
_LEFT = Text("Leave such samples out of the data set, or take a larger ", Fix("batch_size"), ".")


@dataclass(frozen=True)
class Sample:
    """One of a set with a collating function of its own."""

    content: Any
    collate: Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Collated:
    """The samples of a DataLoader with its own `collate_fn`, which batches them here too."""

    source: Any
    collate: Callable[[list[Any]], Any]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.source[index], self.collate)

    @property
    def labels(self) -> Any:
        """Those of the set, where it has them."""
        return getattr(self.source, "labels", None)


def batch_of(items: Sequence[Any], network: Taker) -> tuple[Any, Tensor]:
    """Samples -> inputs and int64 labels `(N,)`; several arguments of the network's forward are a tuple.

    Samples are (input, label), or what becomes a batch with labels by torch's `default_collate`, or by the function
    that they bring (`Sample`). Raises DataError.
    """
    first = items[0]
    if isinstance(first, Sample):
        batch = first.collate([item.content for item in items])
        found = None if batch is None else parted(batch, network)
        if found is None or not len(found[1]):
            raise DataError(f"the collate_fn left none of the {plural(len(items), 'sample')} of a batch", hint=_LEFT)
        return found
    several = isinstance(first, (tuple, list)) and (len(first) > 2 or any(isinstance(x, _MANY) for x in first[:1]))
    if not (several or isinstance(first, Mapping)):
        return collate(items)
    return parted(stacked(items), network)


_MANY = (Mapping, tuple, list)


def parted(batch: Any, network: Taker) -> tuple[Any, Tensor]:
    """A batch -> inputs and labels, as `batch_of` gives them. Raises DataError for one without labels."""
    args, labels = split(batch, network, labelled=True)
    return _with_labels(args, labels)


def _with_labels(args: tuple[Any, ...], labels: Tensor | None) -> tuple[Any, Tensor]:
    if labels is None:
        raise DataError("a batch of the data has no labels (N,), one whole number for each sample", hint=LABELLED)
    if len(labels) and int(labels.min()) < 0:
        raise DataError(f"there is a label {int(labels.min())}, and a classifier's are numbers from 0", hint=LABELLED)
    return (args[0] if len(args) == 1 else args), labels


def called(forward: Callable[..., Any], inputs: Any) -> Any:
    """What the network gives: a tuple holds several arguments."""
    return forward(*inputs) if isinstance(inputs, tuple) else forward(inputs)


def is_batch(item: Any, network: Taker) -> bool:
    """Whether that is a batch with a label `(N,)` for each of its samples, and not itself a sample."""
    if is_pair(item):
        return True
    try:
        return split(item, network, labelled=True)[1] is not None
    except DataError:
        return False


def are_batches(data: Any, network: Taker) -> bool:
    """Whether that is a list of batches, or a single one that is a dict."""
    if isinstance(data, Mapping):
        return True
    return isinstance(data, (list, tuple)) and len(data) > 0 and all(is_batch(item, network) for item in data)


def given_batches(data: Any, network: nn.Module | None, batch_size: int | None = None) -> Batches | None:
    """Batches that the caller has made, as they are, with labels; None for samples, of which batches are to be made.

    batch_size: of a stream of samples, by default 64.
    """
    streamed = isinstance(data, Iterable) and not hasattr(data, "__getitem__")
    if isinstance(data, (DataLoader, IterableDataset, Mapping)) or streamed:
        return replace(as_batches(data, batch_size or 64, once=True, network=network), labelled=True)
    if are_batches(data, network) and not all(map(is_pair, data)):
        return replace(as_batches(data, network=network), labelled=True)
    return None


def loaded(batches: Batches, most: int | None) -> Iterator[Loaded]:
    """For what measures; at most so many samples. Raises DataError for a batch without labels."""
    left = most
    for args, labels in batches:
        inputs, labels = _with_labels(args, labels)
        count = len(labels)
        if left is not None and count > left and images_in(args) == count:  # a graph is of one piece
            part = tuple(rows(arg, slice(left), count) for arg in args)
            inputs, labels = _with_labels(part, labels[:left])
        yield Loaded((inputs, labels), len(labels))
        left = None if left is None else left - len(labels)
        if left is not None and left <= 0:
            return


def gathered(batches: Iterable[Any], network: Taker) -> Tensors:
    """Batches as one set in memory, whose samples can be drawn anew. Raises DataError where they differ in size."""
    parts = [parted(batch, network) for batch in batches]
    inputs = [each if isinstance(each, tuple) else (each,) for each, _ in parts]
    labels = torch.cat([labels for _, labels in parts])
    if not all(
        isinstance(x, Tensor) and len(x) == len(y) for args, (_, y) in zip(inputs, parts, strict=True) for x in args
    ):
        raise DataError("finetune draws its batches anew, and those given do not come apart", hint=_OWN_BATCHES)
    shapes = [tuple(x.shape[1:] for x in args) for args in inputs]
    if other := next((shape for shape in shapes if shape != shapes[0]), None):
        raise DataError(
            "finetune draws its batches anew, and those given differ in size: samples of "
            f"{', '.join(map(str, map(tuple, shapes[0])))} and of {', '.join(map(str, map(tuple, other)))}",
            hint=_OWN_BATCHES,
        )
    columns = tuple(map(torch.cat, zip(*inputs, strict=True)))
    return Tensors(columns if len(columns) > 1 else columns[0], labels)


def samples_of(loader: DataLoader[Any]) -> Any:
    """The set behind a DataLoader, for batches that are drawn anew, by its own `collate_fn` where it has one."""
    source: Any = loader.dataset
    if loader.batch_size is None and loader.batch_sampler is None:
        raise DataError("the DataLoader's data set holds batches, and finetune draws its own", hint=_OWN_BATCHES)
    if isinstance(loader.sampler, SubsetRandomSampler):
        source = Subset(source, list(loader.sampler.indices))
    own = loader.collate_fn not in (default_collate, default_convert)
    return Collated(source, loader.collate_fn) if own and _has_order(source) else source


def _has_order(source: Any) -> bool:
    return hasattr(source, "__getitem__") and not isinstance(source, IterableDataset)


def told_of(loader: Any, batch_size: int) -> str:
    """What a run does otherwise than the DataLoader that it was given; empty where that is nothing."""
    if not isinstance(loader, DataLoader) or not _has_order(loader.dataset):
        return ""
    usual = (SequentialSampler, RandomSampler, SubsetRandomSampler, DistributedSampler)
    if loader.batch_size is None or not isinstance(loader.sampler, usual):
        what = "batch_sampler" if loader.batch_size is None else type(loader.sampler).__name__
        return f"batches of {batch_size} are drawn at random from the DataLoader's data set; its {what} is not used"
    if loader.batch_size != batch_size:
        return f"batches have {batch_size} samples (batch_size), not the DataLoader's {loader.batch_size}"
    return ""
