"""How a network wants its images: from its library where that says it, else from --size, --mean and --std."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ...machine.limits import check_images
from . import options
from .networks import ResolvedSource

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...data.preprocess import Preprocess


@dataclass(frozen=True)
class PreprocessOverrides:
    """--size, --mean and --std, read; None where the user did not say."""

    size: tuple[int, int] | str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, ctx: typer.Context) -> PreprocessOverrides:
        """Raises a usage error for texts that are no numbers, and OptionError for images that no memory holds.

        A command with --task detection takes none of them.
        """
        sides = options.image_size(ctx, ctx.params["size"])
        if isinstance(sides, tuple):
            given = (ctx.params.get(name) for name in ("batch_size", "images"))
            check_images(*sides, min((count for count in given if count), default=1))
        mean, std = (options.channel_values(ctx, f"--{name}", ctx.params[name]) for name in ("mean", "std"))
        found = cls(sides, mean, std)
        _check_scale(ctx, mean, std)
        if ctx.params.get("task") == "detection" and found.given():
            raise options.usage(
                ctx, "detectors resize and normalise their images themselves: leave --size, --mean and --std out"
            )
        return found

    def given(self) -> dict[str, Any]:
        """What the user said, as arguments of Preprocess."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def words(self) -> list[str]:
        """The words of a command line that say the same."""
        texts = {
            name: value if isinstance(value, str) else ",".join(f"{v:g}" for v in value)
            for name, value in self.given().items()
        }
        return [word for name, text in texts.items() for word in (f"--{name}", text)]


_MOST = 2.0  # of what is subtracted from values of 0 to 1, or divides them


def _check_scale(ctx: typer.Context, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> None:
    """Raise a usage error for what is meant for values of 0 to 255, which leaves nothing of values of 0 to 1."""
    given = {"--mean": mean, "--std": std}
    large = [flag for flag, values in given.items() if values is not None and max(values) > _MOST]
    if large:
        scaled = {flag: ",".join(f"{v / 255:.3g}" for v in values) for flag, values in given.items() if values}
        ways = " ".join(f"{flag} {text}" for flag, text in scaled.items())
        raise options.usage(ctx, f"pixels are from 0 to 1, not to 255, which {large[0]} is for; divided by 255: {ways}")


@dataclass(frozen=True)
class Preparation:
    """What turns a PIL image into the network's input. stack: whether images form one tensor, not a list."""

    transform: Preprocess | Callable[[Any], Tensor]
    stack: bool

    def __str__(self) -> str:
        from ...data.preprocess import Preprocess

        if not isinstance(self.transform, Preprocess):
            return "prepared as the published weights need it"
        if not self.stack:
            return "at their own size, values 0 to 1"
        size = self.transform.size
        size = size if isinstance(size, str) else f"{size[0]}x{size[1]}"
        mean, std = (" ".join(f"{v:g}" for v in values) for values in (self.transform.mean, self.transform.std))
        return f"size {size}, mean {mean}, std {std}"

    def settled(self, files: Sequence[Path]) -> Preparation:
        """With the size that the first of these pictures gives, where it is theirs to decide."""
        from ...finetuning.datasets.augmentation import settled

        return replace(self, transform=settled(self.transform, tuple(files)))

    def to_dict(self) -> dict[str, Any] | None:
        """JSON values; None for a library's own callable."""
        from ...data.preprocess import Preprocess

        return self.transform.to_dict() if isinstance(self.transform, Preprocess) else None


def prepare(model: nn.Module, origin: ResolvedSource, asked: PreprocessOverrides) -> Preparation:
    """What the library says of the network's weights, with what the user says in its place."""
    from ...data.preprocess import Preprocess
    from ...modules.restore import is_detector

    channels = _channels(model)
    if is_detector(model):
        return Preparation(replace(Preprocess.raw(channels), **asked.given()), stack=False)
    said = _of_library(model, origin)
    known = Preprocess.of(said) if said is not None else None
    if said is not None and known is None and callable(said) and not asked.given():
        return Preparation(said, stack=True)
    base = known or Preprocess(channels=channels)
    if asked.size is not None:
        base = replace(base, resize=None)
    return Preparation(replace(base, **asked.given()), stack=True)


def known_inputs(model: nn.Module, origin: ResolvedSource, asked: PreprocessOverrides) -> dict[str, Any]:
    """What the library and the user say of the inputs, as a record remembers it; nothing where neither does."""
    from ...data.preprocess import Preprocess

    said = _of_library(model, origin)
    known = Preprocess.of(said) if said is not None else None
    if known is None and not asked.given():
        return {}
    prepared = replace(known or Preprocess(channels=_channels(model)), **asked.given())
    found: dict[str, Any] = {}
    if known is not None or asked.mean is not None or asked.std is not None:
        found = {"mean": list(prepared.mean), "std": list(prepared.std)}
    if not isinstance(prepared.size, str):
        found["shape"] = [prepared.channels, *prepared.size]
    return found


def remember(model: nn.Module, preparation: Preparation) -> None:
    """Note in the network's record how the images that it is trained on are prepared, where that is known."""
    from ...conversion.record import record_of
    from ...data.preprocess import Preprocess

    record, how = record_of(model), preparation.transform
    if record is None or not isinstance(how, Preprocess):
        return
    shape = {} if isinstance(how.size, str) else {"shape": [how.channels, *how.size]}
    record.inputs = {**record.inputs, "mean": list(how.mean), "std": list(how.std), **shape}


def _channels(model: nn.Module) -> int:
    from torch import nn

    first = next((m for m in nn.Module.modules(model) if isinstance(m, nn.Conv2d)), None)
    return 1 if first is not None and first.in_channels == 1 else 3


def _of_library(model: nn.Module, origin: ResolvedSource) -> Any:
    source = origin.source
    if source is None:
        return None
    if source.kind == "torchvision" and source.variant is not None:
        from torchvision.models import get_model_weights

        return get_model_weights(source.name)[source.variant].transforms()
    if source.kind == "timm":
        return getattr(model, "pretrained_cfg", None)
    if source.kind == "hf":
        return _of_processor(source.name)
    return None


def _of_processor(name: str) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name).to_dict()
    except Exception:  # hub, network and file errors of several libraries; the usual preparation is then tried
        return None
