"""Measure how far one network is from another, layer by layer and at the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.record import arguments_of
from ..data.batches import MAX_BAD, Batches, as_batches
from ..data.one_batch import images_in
from ..display.overview import ReportInNotebook
from ..errors import DataError, Fix, Text
from ..inspection.example_inputs import guess_inputs, random_tensor, runs
from ..modules.restore import evaluating, moved, undisturbed
from ..modules.tree import device_and_dtype
from ..modules.wrappers import check_module, unwrapped
from .layers import Difference, LayerTally, comparable_paths, images_at_once, parts
from .outputs import OutputTally, floating

JUMP = 10.0
"""A layer jumps when its error is so many times the largest error before it."""

_RANDOM_IMAGES = 8
_ALIKE = 1e-4
"""Up to this relative error, what the self-check of a conversion allows too, two networks give the same."""
ALL_ZERO = "both networks give nothing but 0, as with a new last layer, so their outputs tell nothing; layers do"


@dataclass(frozen=True)
class VerificationReport(ReportInNotebook):
    """How far network b is from network a.

    images: how many both have seen; random_inputs: whether those were random numbers for want of data.
    error, max_abs: of all floating outputs together, as in `Difference`; None for detections, which have no fixed
        shape. outputs: each of the output's tensors. layers: in the order in which a runs them.
    first_jump: the first layer whose error is over ten times the largest before it, and over what rounding explains
        (1e-4 in float32): where the networks part. None if none does.
    agreement: share of images (of pixels for a segmentation) with the same best class; for detectors, the F1 of b's
        boxes against a's at IoU 0.5 and score 0.5. kl: KL(a || b) in nats, mean over the same. None for other networks.
    accuracy_a, accuracy_b: top-1 on the `labelled` images that came with a label; None without any.
    notes: what could not be compared, and why. bad: images that could not be read and were left out.
    """

    images: int
    random_inputs: bool
    error: float | None
    max_abs: float | None
    outputs: tuple[Difference, ...] = field(repr=False)
    layers: tuple[Difference, ...] = field(repr=False)
    first_jump: str | None
    agreement: float | None = None
    kl: float | None = None
    accuracy_a: float | None = None
    accuracy_b: float | None = None
    labelled: int = 0
    notes: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()

    @property
    def worst(self) -> Difference | None:
        """The layer with the largest error; None if no layer was compared."""
        return max(self.layers, key=lambda layer: layer.error, default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON values. An infinite error, which JSON cannot hold, is the text "inf"."""
        return _jsonable(asdict(self))

    def __str__(self) -> str:
        what = "random inputs (no data given)" if self.random_inputs else "images" if self.images != 1 else "image"
        lines = [f"{self.images} {what}", *self._about_outputs()]
        if self.labelled:
            lines.append(f"accuracy: {self.accuracy_a:.4f} -> {self.accuracy_b:.4f} on {self.labelled} labelled images")
        if self.layers:
            lines.append(f"layers: {len(self.layers)} compared, {self._about_layers()}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *filter(None, [self.verdict and f"{self.verdict}; data of your own does"])])

    @property
    def verdict(self) -> str:
        """What random inputs show, in words; empty where there was data, whose figures speak."""
        if not self.random_inputs:
            return ""
        where = f"on {self.images} random inputs"
        if self.error is None or not math.isfinite(self.error):
            return f"A and B cannot be told alike or different {where}, which say nothing about accuracy"
        if ALL_ZERO in self.notes:
            return f"A and B give nothing but 0 {where}, which says nothing about accuracy"
        if self.error == 0:
            return f"A and B agree exactly {where}, which says nothing about accuracy"
        alike = "agree to rounding" if self.error <= _ALIKE else "differ"
        return f"A and B {alike} {where} (relative error {self.error:.2g}), which says nothing about accuracy"

    def _about_layers(self) -> str:
        worst = self.worst
        if worst is None or worst.error == 0:
            return "all equal"
        text = f"worst {worst.path} ({worst.error:.3g})"
        if self.first_jump is None:
            return f"{text}, nowhere a jump"
        at = next(layer.error for layer in self.layers if layer.path == self.first_jump)
        return f"{text}, first jump at {self.first_jump} ({at:.3g})"

    def _about_outputs(self) -> list[str]:
        parts = [] if self.error is None else [f"relative error {self.error:.3g}, largest {self.max_abs:.3g}"]
        if self.random_inputs and self.error is not None:  # of no class, so that nothing is decided alike or not
            return ["output: " + ", ".join(parts)]
        if self.agreement is not None:
            parts.append(f"{'agreement' if self.error is not None else 'boxes agree: F1'} {self.agreement:.4f}")
        if self.kl is not None:
            parts.append(f"KL {self.kl:.3g}")
        return ["output: " + ", ".join(parts)] if parts else []


@torch.no_grad()
def verify(
    a: nn.Module,
    b: nn.Module,
    data: Any = None,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    preprocess: Callable[[Any], Tensor] | None = None,
    max_bad: int = MAX_BAD,
) -> VerificationReport:
    """Run both networks on the same images and measure how far b is from a. Leaves both as they were.

    data: see `as_batches`; without any, random inputs that a is found to take. device: where both run (and come back
    from), "auto" for a GPU if there is one; by default each where it is.
    preprocess: of a folder's images, by default `Preprocess()`; max_bad: so many that cannot be read are left out.
    Both run in eval mode without gradients; images are cast to each one's dtype.
    Norms, and convolutions and linear layers into which nothing was folded, are compared where both networks have
    them under the same path. Memory does not grow with the number of images, and a batch whose layer outputs would
    fill more than 1 GiB runs in parts. Layers under `roi_heads` are left out: what a two-stage detector feeds them
    depends on the proposals. Outputs of a length that depends on what each network finds are left out, with a note.

    Raises DataError when a network cannot run on the data, no input is known, or the outputs do not compare, and
    OptionError for a device that does not exist.
    """
    check_module(a, "a")
    check_module(b, "b")
    a, b = unwrapped(a), unwrapped(b)
    if data is None:
        batches = _random_batches(a)
    else:
        reading: dict[str, Any] = {"preprocess": preprocess, "max_bad": max_bad, "inputs": arguments_of(a, b)}
        batches = as_batches(data, batch_size, once=True, network=a, **reading)
    layers = LayerTally(comparable_paths(a, b))
    uneven = bool(layers.paths) and same_layers(a, b)
    tally = OutputTally(None if batches.classes is None else len(batches.classes), uneven)
    images = 0
    with ExitStack() as stack:
        for model in (a, b):
            stack.enter_context(moved(model, device))
            stack.enter_context(evaluating(model))
            stack.enter_context(undisturbed(model))
        most = 0
        for args, labels in batches:
            if not all(bool(t.isfinite().all()) for t in floating(args).values()):
                raise DataError("a batch of the data holds NaN or Inf")
            most = most or images_at_once(a, args, layers.paths)
            for part, part_labels in parts(args, labels, most):
                tally.add(*layers.run(a, b, part), part_labels)
                images += images_in(part)
    report = _report(tally, layers, images, data is None, max(_rounding(a), _rounding(b)))
    return replace(report, bad=batches.bad)


def same_layers(a: nn.Module, b: nn.Module) -> bool:
    """Whether the two have layers in common, and all of these of one size: their heads too."""
    ours = {name: p.shape for name, p in a.named_parameters()}
    both = [(ours[name], p.shape) for name, p in b.named_parameters() if name in ours]
    return bool(both) and all(one == other for one, other in both)


def _random_batches(model: nn.Module) -> Batches:
    inputs = guess_inputs(model)
    if inputs is None:
        raise DataError(
            f"no input is known that {type(model).__name__} runs on, so the networks cannot be compared without data",
            hint=Text("Give images with ", Fix("data"), ", or batches of other inputs."),
        )
    if len(inputs) == 1 and isinstance(inputs[0], Tensor):
        more = (random_tensor((_RANDOM_IMAGES, *inputs[0].shape[1:]), model),)
        inputs = more if runs(model, more) else inputs
    return Batches((inputs[0] if len(inputs) == 1 else (inputs, None),))


def _rounding(model: nn.Module) -> float:
    """A relative error that rounding alone may cause. On CUDA, float32 convolutions keep ten bits (TF32)."""
    device, dtype = device_and_dtype(model)
    unit = 2.0**-10 if device.type == "cuda" and dtype == torch.float32 else torch.finfo(dtype).eps
    return max(1e-4, 10 * unit)


def first_jump(layers: Iterable[Difference], floor: float = 1e-4) -> str | None:
    """The first layer whose error exceeds both `floor` and ten times the largest error before it."""
    largest = 0.0
    for layer in layers:
        if layer.error > max(floor, JUMP * largest):
            return layer.path
        largest = max(largest, layer.error)
    return None


def _report(
    tally: OutputTally, layers: LayerTally, images: int, random_inputs: bool, rounding: float
) -> VerificationReport:
    detector = tally.boxes is not None
    differences = layers.differences(without="roi_heads" if detector else None)
    notes = list(tally.notes)
    if not layers.paths:
        notes.append("no layer has the same path in both networks; only the outputs were compared")
    if layers.uneven:
        count, example = len(layers.uneven), min(layers.uneven)
        what = "a layer was" if count == 1 else f"{count} layers were"
        notes.append(f"{what} left out, since the outputs differ in number or shape: {example}{' ...' * (count > 1)}")
    if tally.outputs and not any(d.reference or d.squares for d in tally.outputs.values()):
        notes.append(ALL_ZERO)
    if detector and tally.agreement() is None:
        notes.append("neither network finds a box with a score over 0.5")
    total = tally.total()
    rates = [count / tally.labelled if tally.labelled else None for count in tally.correct]
    return VerificationReport(
        images,
        random_inputs,
        None if total is None else total.relative,
        None if total is None else total.largest,
        tuple(Difference(name or "output", d.relative, d.largest) for name, d in tally.outputs.items()),
        differences,
        first_jump(differences, rounding),
        tally.agreement(),
        tally.divergence / tally.samples if tally.samples else None,
        rates[0],
        rates[1],
        tally.labelled,
        tuple(notes),
    )


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, (list, tuple)) else value
