"""Compare what two networks give out: running sums over batches, weighted by their size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError
from ..modules.precision import at_least_float32

SCORE = 0.5
IOU = 0.5
_ROW = 2**10
_AT_ONCE = 2**22  # scores compared at a time: a segmentation gives one for every class and pixel, here in float64


_UNEVEN = "of another length in each network, so not compared; the layers' outputs are"
_NONE = "the networks' outputs hold no floating tensor, so they are not compared; the layers' outputs are"


@dataclass
class Deviation:
    """How far `b` is from `a`, over everything added so far, as if it were one long vector."""

    squares: float = 0.0
    reference: float = 0.0
    largest: float = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Count two tensors of one shape, in at least float32, summed in float64."""
        a, b = at_least_float32(a.detach()).to(b.device), at_least_float32(b.detach())
        if a.numel() == 0:
            return
        difference, reference = b - a, a
        total = _squares(difference)
        if not math.isfinite(total):
            # Infinities on both sides (a mask, say) agree; NaN agrees with nothing.
            same = a == b
            difference = torch.where(same, 0.0, difference)
            reference = torch.where(same & ~torch.isfinite(a), 0.0, a)
            total = _squares(difference)
        low, high = torch.aminmax(difference)
        largest = max(-float(low), float(high))
        self.squares += total if math.isfinite(total) else math.inf
        self.reference += _squares(reference)
        self.largest = max(self.largest, largest if math.isfinite(largest) else math.inf)

    @property
    def relative(self) -> float:
        """`|a - b| / |a|`; infinite if a value is not finite, `|a - b|` itself if a is all zeros."""
        if not (math.isfinite(self.squares) and math.isfinite(self.reference)):
            return math.inf
        return math.sqrt(self.squares / self.reference) if self.reference > 0 else math.sqrt(self.squares)


def _squares(tensor: Tensor) -> float:
    """The sum of squares: in float32 over short rows, in float64 over those. Exact to 1e-6, at ten times the speed."""
    flat = tensor.reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).double()
    total = float(rows.square().sum() + torch.linalg.vector_norm(flat[whole:], dtype=torch.float64).square())
    if not math.isfinite(total):  # squares beyond 1e38 overflow in float32
        total = float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2
    return total


@dataclass
class OutputTally:
    """Sums over the outputs of two networks, batch by batch.

    outputs: one `Deviation` for each floating tensor of the output, by its name in it. samples: decisions counted
    (images; pixels of a segmentation; queries of a DETR), `same`: equal ones; `divergence`: the sum of KL(a || b).
    correct, labelled: for accuracy. boxes: matched, of a, of b. classes: how many the labels tell apart, if known.
    same_layers: the networks differ in their norms alone, so that tensors of other lengths (boxes, key points: as many
    as each network finds) are no fault; they are left out, and `notes` says so. uneven: kinds of those (see `kind_of`);
    decided: of the tensor that decisions were counted in.
    """

    classes: int | None = None
    same_layers: bool = False
    outputs: dict[str, Deviation] = field(default_factory=dict)
    samples: int = 0
    same: int = 0
    divergence: float = 0.0
    correct: list[int] = field(default_factory=lambda: [0, 0])
    labelled: int = 0
    boxes: list[int] | None = None
    notes: dict[str, None] = field(default_factory=dict)
    uneven: set[str] = field(default_factory=set)
    decided: str | None = None

    def add(self, a: Any, b: Any, labels: Tensor | None) -> None:
        """Count one batch's outputs. Raises DataError when the two do not have the same structure and shapes."""
        if are_detections(a) and are_detections(b):
            self.boxes = self.boxes or [0, 0, 0]
            for one, other in zip(a, b, strict=True):
                counts = matched_boxes(one, other)
                self.boxes = [total + count for total, count in zip(self.boxes, counts, strict=True)]
            return
        first, second = floating(a), floating(b)
        if self.same_layers:
            if not first and not second:
                self.notes[_NONE] = None
                return
            self._leave_out(first, second)
            if not first:
                return
        _require_same(first, second)
        for name, tensor in first.items():
            self.outputs.setdefault(name, Deviation()).add(tensor, second[name])
        scores = _logits(a, first)
        if scores is not None:
            self.decided = kind_of(scores)
            one, other = first[scores], second[scores].to(first[scores].device)
            self._decide(_class_last(one), _class_last(other))
            if labels is not None and one.dim() == 2:
                self._judge(one, other, labels.to(one.device))

    def _leave_out(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
        """Take from both what the networks do not have in one shape, in this batch or an earlier one."""
        new = {kind_of(name) for name in unlike(a, b)} - self.uneven
        self.uneven |= new
        for table in (a, b, self.outputs):
            for name in [name for name in table if kind_of(name) in self.uneven]:
                del table[name]
        if self.decided in new:  # what earlier batches decided by it was by chance
            self.samples = self.same = self.labelled = 0
            self.divergence, self.correct = 0.0, [0, 0]
        if new:
            self.notes = {note: None for note in self.notes if _UNEVEN not in note}
            self.notes[f"{', '.join(sorted(kind or 'the output' for kind in self.uneven))}: {_UNEVEN}"] = None

    def _decide(self, a: Tensor, b: Tensor) -> None:
        """Count decisions between the classes in the last dimension."""
        a, b = a.flatten(0, -2), b.flatten(0, -2)
        rows = max(1, _AT_ONCE // a.shape[1])
        for one, other in zip(a.split(rows), b.split(rows), strict=True):
            one, other = one.double(), other.double()
            usable = ~(one.isnan().any(1) | other.isnan().any(1))
            self.samples += len(one)
            self.same += int(((one.argmax(1) == other.argmax(1)) & usable).sum())
            p, q = F.log_softmax(one, 1), F.log_softmax(other, 1)
            # A class that a rules out adds nothing, whatever b says of it: 0 log 0 = 0.
            total = float(torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum())
            self.divergence += max(0.0, total) if math.isfinite(total) else math.inf

    def _judge(self, a: Tensor, b: Tensor, labels: Tensor) -> None:
        known = a.shape[1]
        if self.classes is not None and self.classes != known:
            note = f"no accuracy: the data has {self.classes} classes, the networks tell {known} apart"
            self.notes.setdefault(note)
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= known:
            raise DataError(
                f"the data has the label {low if low < 0 else high}, but the networks' classes are 0 to {known - 1}",
                hint="Give data without labels, or labels that count the networks' own classes.",
            )
        self.labelled += len(labels)
        for i, logits in enumerate((a, b)):
            right = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
            self.correct[i] += int(right.sum())

    def total(self) -> Deviation | None:
        """Over all floating tensors of the output together; None for detections."""
        if not self.outputs:
            return None
        parts = self.outputs.values()
        return Deviation(
            math.fsum(d.squares for d in parts), math.fsum(d.reference for d in parts), max(d.largest for d in parts)
        )

    def agreement(self) -> float | None:
        """Share of equal decisions; for detectors the F1 of b's boxes against a's. None if there was none to make."""
        if self.boxes is not None:
            matched, ours, theirs = self.boxes
            return 2 * matched / (ours + theirs) if ours + theirs else None
        return self.same / self.samples if self.samples else None


def floating(tree: Any, name: str = "") -> dict[str, Tensor]:
    """The floating tensors of any output, by their place in it: tensor, tuple, list, dict, dataclass, ModelOutput."""
    if isinstance(tree, Tensor):
        return {name: tree} if tree.is_floating_point() else {}
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, (list, tuple)):
        items = [(str(i), value) for i, value in enumerate(tree)]
    elif is_dataclass(tree) and not isinstance(tree, type):
        items = [(f.name, getattr(tree, f.name)) for f in fields(tree)]
    else:
        return {}
    return {k: t for key, value in items for k, t in floating(value, f"{name}.{key}" if name else key).items()}


def kind_of(name: str) -> str:
    """What a tensor of an output is: its name, without the number of its image where each has some of its own."""
    number, dot, rest = name.partition(".")
    return rest if dot and number.isdecimal() else name


def unlike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> set[str]:
    """Names that are not in both in one shape, and all of their kind: equal numbers for some images are chance."""
    names = a.keys() | b.keys()
    kinds = {kind_of(n) for n in names if n not in a or n not in b or a[n].shape != b[n].shape}
    return {name for name in names if kind_of(name) in kinds}


def are_detections(out: Any) -> bool:
    """Whether the output is torchvision's for detectors: for each image a dict with `boxes`, `labels`, `scores`."""
    return (
        isinstance(out, (list, tuple))
        and len(out) > 0
        and all(isinstance(one, Mapping) and {"boxes", "labels", "scores"} <= one.keys() for one in out)
    )


def matched_boxes(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """(matched, of a, of b), counting boxes `(n, 4)` (x1, y1, x2, y2) with a score over 0.5.

    In falling order of score, each box of b takes the free box of a with the same label that overlaps it most, if
    their intersection over union is at least 0.5: the matching of PASCAL VOC (Everingham et al. 2010).
    """
    from torchvision.ops import box_iou

    device = b["boxes"].device
    keep_a, keep_b = a["scores"] > SCORE, b["scores"] > SCORE
    order = b["scores"][keep_b].argsort(descending=True)
    found, wanted = b["boxes"][keep_b][order].double(), a["boxes"][keep_a].to(device).double()
    overlap = box_iou(found, wanted).nan_to_num()  # NaN for two boxes without area
    same_label = b["labels"][keep_b][order][:, None] == a["labels"][keep_a].to(device)[None]
    overlap = torch.where(same_label, overlap, 0.0).cpu()
    matched = 0
    for row in overlap if overlap.shape[1] else ():
        best = int(row.argmax())
        if row[best] >= IOU:
            matched += 1
            overlap[:, best] = 0.0
    return matched, int(keep_a.sum()), int(keep_b.sum())


def _logits(out: Any, tensors: dict[str, Tensor]) -> str | None:
    """The name of the tensor that holds class scores; None when the output does not look like a classifier's."""
    if isinstance(out, Mapping):
        for name in ("logits", "out"):
            if name in tensors and tensors[name].dim() >= 2 and _class_last(tensors[name]).shape[-1] > 1:
                return name
    return next((name for name, t in tensors.items() if t.dim() == 2 and t.shape[1] > 1), None)


def _class_last(logits: Tensor) -> Tensor:
    """Classes are dimension 1 of `(N, K)` and `(N, K, H, W)`, the last of `(N, queries, K)`."""
    return logits.movedim(1, -1) if logits.dim() > 3 else logits


def _require_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (a, b)]
    if not a and not b:
        raise DataError("the networks' outputs hold no floating tensor, so there is nothing to compare")
    if shapes[0] != shapes[1]:
        texts = [", ".join(f"{n} {s}".strip() for n, s in shape.items()) or "no tensor" for shape in shapes]
        raise DataError(
            f"the two networks' outputs cannot be compared: the first gives {texts[0]}, the second {texts[1]}",
            hint="Compare networks with the same head (number of classes).",
        )
