"""Inputs to calibrate on where the user gives none: crops of bundled photographs, or inputs optimised from them.

"photos" are random crops of the photographs in the package. "synthetic" goes on from them: the pixels are moved until
the network's norms see the mean and variance that they remember from training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import seed_value
from ..choices import STAND_INS
from ..data.one_batch import needed
from ..data.photographs import crops
from ..data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from ..errors import DataError, Fix, OptionError, Text
from ..inspection.example_inputs import as_inputs, guess_inputs, runs
from ..modules.tree import device_and_dtype
from .fit import MADE, ODD, Fit, fit, remembering, statistics_loss

COUNTS = {"photos": 256, "synthetic": 128}
_SIZES = (32, 64, 128)  # tried where the network's own is not known
_ENOUGH_PIXELS = 128  # a side of what is made: 64 of these kept more than 32 of 224 pixels, in less time
_FROM, _FARTHER = 160, 0.05  # sides reduced to that, unless the fit suffers by more
_LARGE, _LARGE_COUNT = 96 * 96, 64  # images with many positions, of which fewer do
_AT_ONCE = 32  # images, so that memory stays bounded
_TRIED = 26  # crops that decide on the range of values; half of them, one of each photograph, on the size
_STEPS, _LARGE_STEPS = 150, 20  # of Adam, at most
_RATE = 0.03  # its rate in standard deviations of the start; with 0.1 a deep network's loss rose before it fell
_ENOUGH = 0.01  # a loss below which more steps gained nothing
_CLEARLY = 0.95


@dataclass(frozen=True)
class Scaling:
    """How pixels in [0, 1] become inputs: `(x - mean) / std` per channel, after the channels are reversed (bgr)."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """x: `(N, C, H, W)` with one or three channels."""
        mean, std = (torch.tensor(values, dtype=x.dtype) for values in (self.mean, self.std))
        if x.shape[1] == 1:
            mean, std = mean.mean().view(1), std.mean().view(1)
        x = x.flip(1) if self.bgr else x
        return (x - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `Scaling.from_dict` is the inverse."""
        return {"name": self.name, "mean": list(self.mean), "std": list(self.std), "bgr": self.bgr}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scaling:
        """The inverse of `to_dict`; name and bgr may be missing."""
        mean, std = tuple(values["mean"]), tuple(values["std"])
        return cls(values.get("name", "as given"), mean, std, bool(values.get("bgr", False)))


_RGB = (
    Scaling("ImageNet's mean and deviation", IMAGENET_MEAN, IMAGENET_STD),
    Scaling("0 to 1", (0.0,) * 3, (1.0,) * 3),
    Scaling("-1 to 1", (0.5,) * 3, (0.5,) * 3),
    Scaling("0 to 255", (0.0,) * 3, (1 / 255,) * 3),
)
_BGR = (
    *(Scaling(f"{s.name}, blue first", s.mean[::-1], s.std[::-1], bgr=True) for s in _RGB),
    Scaling("0 to 255 less the mean, blue first", (0.408, 0.458, 0.482), (1 / 255,) * 3, bgr=True),
)


@dataclass(frozen=True)
class StandIns:
    """batches: tensors for the forward. fit: how well they suit the network. scaling: None for no images."""

    kind: str
    batches: list[Tensor]
    fit: Fit
    shape: tuple[int, ...]
    scaling: Scaling | None = None

    def __str__(self) -> str:
        count = sum(map(len, self.batches))
        what = {"photos": "crops of photographs", "synthetic": "synthetic inputs"}[self.kind]
        values = f", values {self.scaling.name}" if self.scaling else ""
        return f"{count} {what} {'x'.join(map(str, self.shape))}{values}; {self.fit}"


def stand_ins(
    kind: str,
    model: nn.Module,
    example_inputs: Any = None,
    *,
    images: int | None = None,
    scaling: Scaling | None = None,
    remembered: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> StandIns:
    """Inputs for `model`, the original network, which has running statistics to compare with.

    kind: "photos" or "synthetic". example_inputs: what its forward takes; only shape, mean and deviation matter.
    remembered: the record's `inputs`, used where nothing is given. Without either, shapes are tried. scaling: of pixel
    values; None takes the one among the usual whose inputs come closest to the running statistics. Where the size is a
    guess, they choose it too. images: how many; by default 256 photographs or 128 synthetic inputs, of large ones 64
    (synthetic ones from 160 pixels a side are made 128, where that fits as well). progress: called with steps done and
    steps in all while inputs are made.

    Raises OptionError for an unknown kind, DataError where no input is known, inputs are neither images nor (for
    "synthetic") a tensor of numbers, or nothing fits.
    """
    if kind not in STAND_INS:
        raise OptionError(Text(Fix("data"), f" must be images, a folder, 'photos' or 'synthetic', got {kind!r}"))
    seed_value("seed", seed)
    if not remembering(model):
        raise DataError("the network has no running statistics that stand-ins could be measured by")
    said = remembered or {}
    known = example_inputs is not None or said.get("shape") is not None
    example = _example(model, example_inputs, said)
    if scaling is None and said.get("mean"):
        scaling = Scaling.from_dict(said)
    shape = whole = tuple(example.shape[1:])
    if len(shape) == 3 and shape[0] in (1, 3):
        scaling = scaling or choose(model, shape, seed)
        if not known:
            shape = whole = _fitting(model, shape, scaling, seed)
        elif kind == "synthetic" and min(shape[1:]) >= _FROM:
            shape = _reduced(model, shape, scaling, seed)
    elif kind == "photos":
        raise DataError(
            f"the network takes inputs of shape {shape}, which are no images",
            hint=Text(Fix("data", "synthetic"), " makes such inputs."),
        )
    large = scaling is not None and shape[-1] * shape[-2] >= _LARGE
    count = images or (_LARGE_COUNT if large else COUNTS[kind])
    start = scaling(_crops(count, whole, shape, seed)) if scaling else noise(count, example, seed)
    made = list(start.split(_AT_ONCE))
    found = fit(model, [(made[0],)])  # the others are of the same kind
    limit = ODD
    if kind == "synthetic":
        # Inputs that started far from the training's and did not arrive there are a stranger's in its clothes.
        limit = ODD if scaling and found is not None and found.distance <= ODD else MADE
        made = optimised(model, made, _LARGE_STEPS if large else _STEPS, progress)
        found = fit(model, [(made[0],)])
    if found is None or found.distance > limit:
        raise DataError(f"no {kind} fit this network: {found}", hint=_hint(kind))
    return StandIns(kind, made, found, shape, scaling)


def _hint(kind: str) -> str:
    own = "Give images of your own."
    return Text(own, "\n", Fix("data", "synthetic"), " makes inputs for the network.") if kind == "photos" else own


def _example(model: nn.Module, given: Any, remembered: Mapping[str, Any]) -> Tensor:
    """One input, `(N, *)`: given, of the shape that the conversion remembers, or guessed."""
    if given is None and remembered.get("shape") is not None:
        given = torch.randn(1, *remembered["shape"], generator=torch.Generator().manual_seed(0))
    if given is None and (count := remembered.get("arguments", 1)) > 1:
        raise _not_for(f"{count} inputs")
    inputs = as_inputs(given) if given is not None else guess_inputs(model)
    if inputs is None and (names := needed(model)) and len(names) > 1:
        raise _not_for(f"{len(names)} inputs")
    if inputs is None:
        own = "A conversion that is given one remembers it, and normswap.calibrate in Python takes data of your own."
        raise DataError(
            "which inputs the network takes is not known",
            hint=Text("Give an input of the size that it takes: ", Fix("example_inputs"), ".\n", own),
        )
    x = inputs[0]
    if len(inputs) != 1:
        raise _not_for(f"{len(inputs)} inputs")
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        raise _not_for("something else")
    return x.detach().float().cpu()


def _not_for(what: str) -> DataError:
    return DataError(
        f"stand-ins are made for networks that take one tensor of floating numbers, and this one takes {what}",
        hint="Give data of your own; normswap.calibrate in Python takes any, such as batches of (x, lengths).",
    )


def _crops(count: int, whole: tuple[int, ...], shape: tuple[int, ...], seed: int) -> Tensor:
    """Crops `(count, *shape)` that show as much of a photograph as those of shape `whole` do."""
    x = crops(count, whole[1:], whole[0], seed)
    return x if whole == shape else F.interpolate(x, size=shape[1:], mode="bilinear", antialias=True)


def _distance(model: nn.Module, shape: tuple[int, ...], scaling: Scaling, seed: int) -> float:
    """Of a few crops of that shape, `(C, H, W)`; infinite where the network does not take them."""
    x = scaling(crops(_TRIED // 2, shape[1:], shape[0], seed))
    found = fit(model, [(x,)]) if runs(model, (x[:1].to(*device_and_dtype(model)),)) else None
    return float("inf") if found is None else found.distance


def _fitting(model: nn.Module, guess: tuple[int, ...], scaling: Scaling, seed: int) -> tuple[int, ...]:
    """The shape whose crops fit best, where no size is known: borders, and what fills a layer's view, show it."""
    shapes = [guess, *((guess[0], side, side) for side in _SIZES if (side, side) != guess[1:])]
    return min(shapes, key=lambda shape: _distance(model, shape, scaling, seed))


def _reduced(model: nn.Module, shape: tuple[int, ...], scaling: Scaling, seed: int) -> tuple[int, ...]:
    """A smaller shape, where crops of it fit as well: more inputs can be made in the same time."""
    short = min(shape[1:])
    smaller = (shape[0], *(round(side * _ENOUGH_PIXELS / short / 32) * 32 for side in shape[1:]))
    return (
        smaller
        if _distance(model, smaller, scaling, seed) <= _distance(model, shape, scaling, seed) + _FARTHER
        else shape
    )


def choose(model: nn.Module, shape: tuple[int, ...], seed: int = 0) -> Scaling:
    """The range of pixel values, among the usual ones, whose inputs come closest to the running statistics.

    shape: `(C, H, W)`, C 1 or 3. Reversed colours have to win clearly, as they hardly show in the statistics.
    """
    pixels = crops(_TRIED, (shape[1], shape[2]), shape[0], seed)
    known = _RGB + (_BGR if shape[0] == 3 else ())
    found = [(fit(model, [(scaling(pixels),)]), scaling) for scaling in known]
    return min((result.distance / (_CLEARLY if s.bgr else 1), i, s) for i, (result, s) in enumerate(found) if result)[2]


def noise(count: int, like: Tensor, seed: int) -> Tensor:
    """Noise of spectrum 1/f along all but batch and channels, with mean and deviation of `like`, `(count, ...)`."""
    x = torch.randn(count, *like.shape[1:], generator=torch.Generator().manual_seed(seed))
    axes = tuple(range(2, x.dim()))
    if axes:
        spectrum = torch.fft.fftn(x, dim=axes)
        grids = torch.meshgrid(*(torch.fft.fftfreq(x.shape[a]) * x.shape[a] for a in axes), indexing="ij")
        x = torch.fft.ifftn(spectrum / torch.stack(grids).norm(dim=0).clamp_min(1), dim=axes).real
    x = (x - x.mean()) / x.std()
    return x * (like.std() if like.numel() > 1 else 1) + like.mean()


def optimised(
    model: nn.Module, batches: Sequence[Tensor], steps: int, progress: Callable[[int, int], None] | None = None
) -> list[Tensor]:
    """Each batch moved, by Adam on its values, towards the statistics that the network's norms remember."""
    device, dtype = device_and_dtype(model)
    found = []
    with statistics_loss(model) as loss, torch.enable_grad():
        for i, batch in enumerate(batches):
            x = batch.to(device, dtype).detach().clone().requires_grad_()
            optimizer = torch.optim.Adam([x], lr=_RATE * float(x.detach().std()), betas=(0.9, 0.99))
            for j in range(steps):
                if progress is not None:
                    progress(i * steps + j, len(batches) * steps)
                value = loss(x)
                (x.grad,) = torch.autograd.grad(value, x)
                optimizer.step()
                if float(value.detach()) < _ENOUGH:
                    break
            found.append(x.detach())
    if progress is not None:
        progress(len(batches) * steps, len(batches) * steps)
    return found
