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
    """

    prepare: Callable[[Any], Tensor]
    crop: bool = True

    def __call__(self, image: Any) -> Tensor:
        from torchvision.transforms import v2

        if not isinstance(self.prepare, Preprocess):
            return self.prepare(v2.RandomHorizontalFlip()(eight_bit(image)))
        prepare = self.prepare.settled(*image.size)
        picture = canonical(image)
        if self.crop and not isinstance(prepare.size, str):
            picture = self._cropped(prepare, picture)
        else:
            picture = prepare.fitted(picture)
        return prepare.normalised(v2.RandomHorizontalFlip()(picture))

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


def training_transform(prepare: Callable[[Any], Tensor], augment: str) -> Callable[[Any], Tensor]:
    """augment: "auto" (crop and mirror), "flip" (mirror only) or "none". Raises OptionError for another word."""
    one_of("augment", augment, AUGMENTS)
    return Plain(prepare) if augment == "none" else Augmented(prepare, crop=augment == "auto")


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
