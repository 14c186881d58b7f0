"""Random changes of training pictures, from what the weights say of their input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...arguments import one_of
from ...choices import AUGMENTS
from ...data.decoding import Unreadable, decode
from ...data.preprocess import SMALL, Preprocess, canonical, eight_bit

_SHIFT = 1 / 8
_LEAST_AREA = 0.35


@dataclass(frozen=True)
class Augmented:
    """PIL image -> tensor `(C, H, W)`: a random crop and a mirroring, then what `prepare` does.

    prepare: a `Preprocess`, whose size and normalisation are kept, or another library's callable, before which there
    is only the mirroring. Pictures up to 64 pixels are shifted by up to an eighth of their size (He et al. 2015,
    section 4.2), larger ones cropped to 0.35 to 1 of their area and resized (Szegedy et al. 2014, with a larger
    least area, as fine-tuning does). crop=False leaves that out: text and handwriting bear neither; see `augment`.
    mirror=False leaves that out. random: so many changes of RandAugment (Cubuk et al. 2019) at torchvision's magnitude,
    9 of 30, come last; they are of 8 bits.
    """

    prepare: Callable[[Any], Tensor]
    crop: bool = True
    mirror: bool = True
    random: int | None = None

    def __call__(self, image: Any) -> Tensor:
        if not isinstance(self.prepare, Preprocess):
            return self.prepare(self._changed(eight_bit(image)))
        prepare = self.prepare.settled(*image.size)
        picture = canonical(image)
        if self.crop and not isinstance(prepare.size, str):
            picture = self._cropped(prepare, picture)
        else:
            picture = prepare.fitted(picture)
        return prepare.normalised(self._changed(picture))

    def _changed(self, picture: Any) -> Any:
        from torchvision.transforms import v2

        if self.mirror:
            picture = v2.RandomHorizontalFlip()(picture)
        if self.random is None:
            return picture
        mode = picture.mode
        picture = eight_bit(picture) if mode == "F" else picture
        return v2.RandAugment(self.random)(picture if mode == "RGB" else picture.convert("L"))

    def _cropped(self, prepare: Preprocess, picture: Any) -> Any:
        from torchvision.transforms import InterpolationMode, v2

        height, width = (int(side) for side in prepare.size)
        if max(height, width) <= SMALL:
            pad = [round(width * _SHIFT), round(height * _SHIFT)]
            return v2.RandomCrop((height, width), padding=pad, padding_mode="reflect")(prepare.fitted(picture))
        mode = InterpolationMode(prepare.interpolation)
        return v2.RandomResizedCrop((height, width), scale=(_LEAST_AREA, 1.0), interpolation=mode, antialias=True)(
            picture
        )


@dataclass(frozen=True)
class Plain:
    """PIL image -> tensor, for a library's callable that takes RGB pictures only."""

    prepare: Callable[[Any], Tensor]

    def __call__(self, image: Any) -> Tensor:
        return self.prepare(image if isinstance(self.prepare, Preprocess) else eight_bit(image))


def training_transform(
    prepare: Callable[[Any], Tensor], augment: str, random: int | None = None
) -> Callable[[Any], Tensor]:
    """augment: "auto" (crop and mirror), "flip" (mirror only) or "none". Raises OptionError for another word."""
    one_of("augment", augment, AUGMENTS)
    if augment == "none" and random is None:
        return Plain(prepare)
    return Augmented(prepare, crop=augment == "auto", mirror=augment != "none", random=random)


def settled(prepare: Callable[[Any], Tensor], files: tuple[Path, ...]) -> Callable[[Any], Tensor]:
    """With the size "auto" decided once, by the first picture that can be read."""
    if not isinstance(prepare, Preprocess) or prepare.size != "auto":
        return prepare
    for file in files[:100]:
        try:
            return prepare.settled(*decode(file).size)
        except Unreadable:
            continue
    return prepare
