"""From a picture to a network's input: size, colour and normalisation, as plain data.

What torchvision, timm and transformers do before inference is a resize, a centre crop and a normalisation by constants.
Held as data instead of as a callable, it can be printed, stored, and overridden one value at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..arguments import one_of
from ..choices import INTERPOLATIONS, Interpolation
from ..errors import Fix, OptionError, Text

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALL = 64
_USUAL = 224
_CROP_FRACTION = 0.875
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


@dataclass(frozen=True)
class Preprocess:
    """Turns a PIL image into a float32 tensor `(channels, H, W)`: `(x - mean) / std`, with x in [0, 1].

    size: `(H, W)`, one number for a square, "native" for no crop, or "auto": the size of the first image if neither of
        its sides exceeds 64 (CIFAR, MNIST), since such a network takes what there is, else 224.
    resize: what comes before the centre crop: one number for the shorter side, `(H, W)` to squash the whole image to
        that, None for the usual. That leaves an image of the right size, and every one under "native", as it is.
        A square over 64 loses the ImageNet border (shorter side to size / 0.875), a smaller square only what does not
        fit in; what is not square is squashed.
    mean, std: per channel, for values in [0, 1]; by default those of ImageNet. One number stands for all channels;
        three are averaged when there is one channel, as timm does.
    interpolation: "nearest", "bilinear", "bicubic" or "lanczos", antialiased (PIL).
    channels: 3 (RGB) or 1 (luminance, ITU-R 601-2).

    Alpha is dropped and EXIF rotation ignored, as torchvision's image folder does. Grey of 16 bits keeps its depth.
    Raises OptionError for values that make no sense.
    """

    size: tuple[int, int] | str = "auto"
    resize: int | tuple[int, int] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Interpolation = "bilinear"
    channels: int = 3

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise OptionError(f"channels must be 3 (colour) or 1 (grey), got {self.channels!r}")
        one_of("interpolation", self.interpolation, INTERPOLATIONS)
        if self.size not in ("auto", "native"):
            object.__setattr__(self, "size", _pair("size", self.size))
        if self.resize is not None and not _is_count(self.resize):
            object.__setattr__(self, "resize", _pair("resize", self.resize))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _per_channel(name, getattr(self, name), self.channels))
        if min(self.std) <= 0:
            raise OptionError(Text(Fix("std"), f" must be positive, got {self.std}"))

    @classmethod
    def raw(cls, channels: int = 3) -> Preprocess:
        """Native size and values in [0, 1]: for torchvision's detectors, which resize and normalise themselves."""
        return cls(size="native", mean=(0.0,) * channels, std=(1.0,) * channels, channels=channels)

    @classmethod
    def of(cls, source: Any) -> Preprocess | None:
        """What a library says its weights need, or None where this class cannot say it (then pass the callable).

        source: `weights.transforms()` of torchvision, a timm `pretrained_cfg`, or the configuration of a transformers
        image processor (`processor.to_dict()`).
        """
        if isinstance(source, Mapping):
            if "input_size" in source:
                return _from_timm(source)
            return _from_transformers(source) if "image_mean" in source else None
        return _from_torchvision(source)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `Preprocess(**values)` is the inverse."""
        return asdict(self)

    def settled(self, width: int, height: int) -> Preprocess:
        """With "auto" decided by an image of that size."""
        if self.size != "auto":
            return self
        return replace(self, size=(height, width) if max(width, height) <= SMALL else (_USUAL, _USUAL))

    def __call__(self, image: Image) -> Tensor:
        """Raises ValueError for an image whose values have no known range."""
        return self.normalised(self.settled(*image.size).fitted(canonical(image)))

    def normalised(self, picture: Image) -> Tensor:
        """A picture in one of the modes of `canonical`, at its own size, as a float32 tensor `(channels, H, W)`."""
        if self.channels == 1 and picture.mode == "RGB":
            picture = picture.convert("L")
        x = as_tensor(picture).expand(self.channels, -1, -1)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    def fitted(self, picture: Image) -> Image:
        """The resize and the centre crop; the size must not be "auto" (see `settled`)."""
        if self.resize is None and self.size in ("native", (picture.height, picture.width)):
            return picture
        from PIL.Image import Resampling

        resized = _resized_to(self._resize(), *picture.size)
        if picture.size != resized:
            picture = picture.resize(resized, Resampling[self.interpolation.upper()])
        if isinstance(self.size, str):
            return picture
        height, width = self.size
        left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
        return picture.crop((left, top, left + width, top + height))

    def _resize(self) -> int | tuple[int, int]:
        if self.resize is not None:
            return self.resize
        height, width = (int(side) for side in self.size)
        if height != width:
            return height, width
        return height if height <= SMALL else math.floor(height / _CROP_FRACTION)


def canonical(image: Image) -> Image:
    """The same picture in mode RGB or L (8 bits), or F with values in [0, 1] where it has more than 8.

    Raises ValueError where the range of the values is not known.
    """
    if image.mode in _DEEP:
        low, high = cast("tuple[float, float]", image.getextrema())
        top = 1.0 if image.mode == "F" else 65535.0
        if not 0 <= low <= high <= top:
            raise ValueError(f"values from {low:g} to {high:g}, and which of them are black and white is unknown")
        return image if image.mode == "F" else image.convert("F").point(lambda value: value * (1 / 65535) + 0)
    if image.mode in ("RGB", "L"):
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, PIL warns about the transparency it drops
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def eight_bit(image: Image) -> Image:
    """In mode RGB, which is what other libraries' transforms expect."""
    picture = canonical(image)
    if picture.mode == "F":
        picture = picture.point(lambda value: value * 255 + 0.5).convert("L")  # convert cuts the fraction off
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def as_tensor(picture: Image) -> Tensor:
    """`(3, H, W)` of an RGB picture, `(1, H, W)` of an L or F one; float32 in [0, 1]."""
    deep = picture.mode == "F"
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.float32 if deep else torch.uint8)
    x = flat.view(picture.height, picture.width, -1).permute(2, 0, 1).contiguous()
    return x.clamp_(0, 1) if deep else x.float().div_(255)  # bicubic overshoots; 8 bits are clamped by PIL


def _resized_to(resize: int | tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """(width, height) after the resize; the longer side is rounded down, as torchvision does."""
    if isinstance(resize, tuple):
        return resize[1], resize[0]
    short, long = min(width, height), max(width, height)
    longer = int(resize * long / short)
    return (resize, longer) if width <= height else (longer, resize)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _pair(name: str, value: Any) -> tuple[int, int]:
    if _is_count(value):
        return value, value
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) == 1 and _is_count(value[0]):
            return value[0], value[0]
        if len(value) == 2 and all(_is_count(side) for side in value):
            return value[0], value[1]
    raise OptionError(Text(Fix(name), f" must be one positive number of pixels, or height and width, got {value!r}"))


def _per_channel(name: str, values: Any, channels: int) -> tuple[float, ...]:
    numbers = (values,) if isinstance(values, (int, float)) else tuple(values)
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers) or len(numbers) not in (1, 3):
        raise OptionError(
            Text(Fix(name), f" must be one or three finite numbers, for values in [0, 1], got {values!r}")
        )
    if len(numbers) == 3 and channels == 1:
        return (math.fsum(numbers) / 3,)
    return tuple(float(v) for v in numbers) * (channels // len(numbers))


def _from_torchvision(preset: Any) -> Preprocess | None:
    kind = type(preset).__name__
    if kind == "ObjectDetection":
        return Preprocess.raw()
    if kind not in ("ImageClassification", "SemanticSegmentation") or not preset.resize_size:
        return None
    size = preset.crop_size if kind == "ImageClassification" else ["native"]
    resize = preset.resize_size
    if len(size) != 1 or len(resize) != 1:
        return None
    return Preprocess(size[0], resize[0], tuple(preset.mean), tuple(preset.std), preset.interpolation.value)


def _from_timm(config: Mapping[str, Any]) -> Preprocess | None:
    channels, *size = config["input_size"]
    mode = config.get("crop_mode") or "center"
    if channels not in (1, 3) or mode not in ("center", "squash") or (mode == "center" and size[0] != size[1]):
        return None
    scaled = [math.floor(side / (config.get("crop_pct") or _CROP_FRACTION)) for side in size]
    filter_name = config.get("interpolation")
    return Preprocess(
        (size[0], size[1]),
        scaled[0] if mode == "center" else (scaled[0], scaled[1]),
        tuple(config.get("mean") or IMAGENET_MEAN),
        tuple(config.get("std") or IMAGENET_STD),
        filter_name if filter_name in INTERPOLATIONS else "bicubic",  # timm's own default
        channels,
    )


def _from_transformers(config: Mapping[str, Any]) -> Preprocess | None:
    size, crop = config.get("size") or {}, config.get("crop_size") or {}
    edge, height, width = (size.get(key) for key in ("shortest_edge", "height", "width"))
    usual = config.get("do_resize", True) and config.get("do_rescale", True) and not size.get("longest_edge")
    if not usual or not (edge or height):
        return None
    crops = bool(crop) and config.get("do_center_crop", True)
    resize: Any = edge or (height, width)
    target: Any = (crop["height"], crop["width"]) if crops else (height, width) if height else "native"
    if edge and "crop_pct" in config:  # ConvNeXt's processor, which ResNet and RegNet use too
        resize = int(edge / (config["crop_pct"] or 224 / 256)) if edge < 384 else (edge, edge)
        target = edge
    normalised, number = config.get("do_normalize", True), config.get("resample", 2)
    return Preprocess(
        target,
        resize,
        tuple(config["image_mean"]) if normalised else (0.0,),
        tuple(config["image_std"]) if normalised else (1.0,),
        INTERPOLATIONS[number] if number in range(4) else "bilinear",
    )
