"""What --input says of one argument of forward: a shape, a shape of whole numbers or of yes and no, or the values."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from ...errors import did_you_mean
from ...machine.limits import check_memory

if TYPE_CHECKING:
    from torch import Tensor, nn

_SHAPE = re.compile(r"(\d+)(,\d+)*")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_WORDS = {"true": True, "false": False}
_FORMS = "1,3,224,224 (a shape), 4,100:0..999 (whole numbers), 4,100:true (a mask), or 4=100,80,60,50 (the values)"


@dataclass(frozen=True)
class GivenInput:
    """One tensor: standard normal of `shape`, or int64 from `between`, bool all `mask`, or these `values`.

    Values that are all whole are int64; others have the network's dtype, as random ones do.
    """

    shape: tuple[int, ...]
    between: tuple[int, int] | None = None
    mask: bool | None = None
    values: tuple[float, ...] | None = None

    @property
    def like_images(self) -> bool:
        """Whether it has the form of images, random numbers `(N, C, H, W)`."""
        return len(self.shape) == 4 and self.random

    @property
    def random(self) -> bool:
        """Whether the shape is all that was said."""
        return self.between is None and self.mask is None and self.values is None

    def tensor(self, model: nn.Module) -> Tensor:
        """On the network's device; random ones are the same each time."""
        import torch

        from ...inspection.example_inputs import random_tensor
        from ...modules.tree import device_and_dtype

        device, dtype = device_and_dtype(model)
        if self.values is not None:
            whole = all(isinstance(value, int) for value in self.values)
            return torch.tensor(self.values, dtype=torch.int64 if whole else dtype, device=device).view(self.shape)
        if self.mask is not None:
            return torch.full(self.shape, self.mask, device=device)
        if self.between is not None:
            low, high = self.between
            return torch.randint(low, high + 1, self.shape, generator=torch.Generator().manual_seed(0)).to(device)
        return random_tensor(self.shape, model)


def given_inputs(ctx: typer.Context, texts: list[str] | None) -> list[GivenInput]:
    """What --input says, once for each argument. Raises OptionError for an input that no memory holds."""
    found = [_given(ctx, text) for text in texts or ()]
    for each in found:
        what = f"an input of {'x'.join(map(str, each.shape))}"
        check_memory((4 if each.between is None else 8) * math.prod(each.shape), what, "Take a smaller --input.")
    return found


def may_take_images(model: nn.Module, given: list[GivenInput]) -> bool:
    """Whether a folder's images may be what the network takes: by --input, or by a guess; True where none runs."""
    from ...data.one_batch import needed
    from ...inspection.example_inputs import guess_inputs

    if given:
        return len(given) == 1 and given[0].like_images
    inputs = guess_inputs(model)
    if inputs is None or len(inputs) > 1:
        return len(needed(model)) < 2
    return not hasattr(inputs[0], "dim") or (inputs[0].dim() == 4 and inputs[0].is_floating_point())


def _given(ctx: typer.Context, text: str) -> GivenInput:
    size, sign, what = re.match(r"([^:=]*)([:=]?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    if _SHAPE.fullmatch(size) is None:
        raise _wrong(ctx, f"{text!r} is not like {_FORMS}")
    shape = tuple(map(int, size.split(",")))
    if min(shape) < 1:
        raise _wrong(ctx, f"every size must be at least 1, got {text!r}")
    if not sign:
        return GivenInput(shape)
    if sign == "=":
        values = tuple(_number(ctx, text, part) for part in what.split(","))
        if len(values) != math.prod(shape):
            raise _wrong(ctx, f"{text!r} has {len(values)} values for a shape of {math.prod(shape)}")
        return GivenInput(shape, values=values)
    if what in _WORDS:
        return GivenInput(shape, mask=_WORDS[what])
    ends = _RANGE.fullmatch(what)
    if ends is None:
        near = did_you_mean(what, _WORDS) or ""
        raise _wrong(
            ctx, f"{what!r} in {text!r} is neither LOW..HIGH, such as 0..999, nor true or false. {near}".strip()
        )
    low, high = map(int, ends.groups())
    if not -(2**63) <= low <= high < 2**63 - 1:
        raise _wrong(ctx, f"there is no whole number of 64 bits from {low} to {high}, in {text!r}")
    return GivenInput(shape, between=(low, high))


def _number(ctx: typer.Context, text: str, part: str) -> float:
    for kind in (int, float):
        try:
            value: float = kind(part)
        except ValueError:
            continue
        if math.isfinite(value) and abs(value) < 2**63:
            return value
    raise _wrong(ctx, f"{part!r} in {text!r} is no number; values are given like 4=100,80,60,50")


def _wrong(ctx: typer.Context, text: str) -> typer.BadParameter:
    return typer.BadParameter(text, ctx=ctx, param_hint="--input")


def example_inputs(model: nn.Module, given: list[GivenInput]) -> tuple[Tensor, ...] | None:
    """The inputs that --input gives; None without any."""
    return tuple(each.tensor(model) for each in given) if given else None


def remembered_inputs(model: nn.Module, images: int = 1) -> tuple[Tensor, ...] | None:
    """Random images of the size that the network's file remembers; None where it does not, or takes others."""
    from ...conversion.record import record_of
    from ...inspection.example_inputs import random_tensor, runs

    record = record_of(model)
    if record is None or "shape" not in record.inputs:
        return None
    inputs = (random_tensor((images, *record.inputs["shape"]), model),)
    return inputs if runs(model, inputs) else None
