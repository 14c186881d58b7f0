"""Arguments and options that several commands share, and how their texts are read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ...arguments import MOST_SEED
from ...choices import DEVICES, INDIVISIBLE, METHODS, NORMS, STAND_INS
from ...errors import OptionError, did_you_mean
from .completion import converted_files, model_names

UsageError: Any = typer.BadParameter.__bases__[0]  # click's own, under a name that all versions of typer have


def completing(*known: str) -> Callable[[str], list[str]]:
    """Completion of one of these words."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return complete


norm_names = completing(*NORMS)
target_names = completing(*NORMS, "original")


def word(known: tuple[str, ...], text: str, *, also: str = "", fits: str = "") -> Any:
    """An option that takes one of a few words, or what `also` stands for: what the expression `fits` matches."""

    def check(ctx: typer.Context, param: typer.CallbackParam, value: str) -> str:
        return value if fits and re.fullmatch(fits, value) else choice(ctx, param.opts[0], value, known)

    shown = "|".join((*known, also) if also else known)
    return typer.Option(metavar=shown, help=text, autocompletion=completing(*known), callback=check)


SOURCE_HELP = (
    "A torchvision name, timm:NAME, hf:ID, package.module:factory, file.py:factory, or a file that normswap wrote."
)

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP, autocompletion=model_names, show_default=False)
]
Converted = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="A file that normswap convert wrote.",
        autocompletion=converted_files,
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="DEFAULT|none|FILE|NAME",
        help="Weights: DEFAULT (a named model's best), none (random), a checkpoint (file, index of shards, folder), or "
        "a name such as IMAGENET1K_V1.",
        show_default=False,
    ),
]
Arg = Annotated[
    list[str] | None,
    typer.Option(
        "--arg", metavar="KEY=VALUE", help="An argument for the model's builder; repeatable.", show_default=False
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="N,C,H,W",
        help="Shape of an input to run the network on, such as 1,3,224,224; 4,100:0..999 draws whole numbers, "
        "4,100:true is a mask, and 4=100,80,60,50 gives values. Repeat it for several arguments: --input 4,40,100 "
        "--input 4=100,80,60,50.",
        show_default=False,
    ),
]
BuiltBy = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="SOURCE",
        help="What builds the network of a converted file, such as file.py:factory, in place of what the file says.",
        show_default=False,
    ),
]
TrustPickle = Annotated[bool, typer.Option("--trust-pickle", help="Run the code that a pickled checkpoint may hold.")]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run the factory that a converted file names to build its network.")
]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Accept weights that hold NaN or Inf.")]
Seed = Annotated[
    int, typer.Option(min=0, max=MOST_SEED, metavar="N", help="Seed of random weights and inputs.", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show warnings of libraries, and where an error happened.")]
Method = Annotated[
    str,
    word(METHODS, "How to calibrate; balance leaves the layers before the norms as they are: three times faster."),
]
Groups = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto", help="Groups of each gn layer; auto aims at 16 channels a group.", show_default="auto"
    ),
]
ChannelsPerGroup = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Channels of each group, in place of --groups.", show_default=False),
]
Indivisible = Annotated[
    str,
    word(INDIVISIBLE, "What to do where the channels do not divide: nearest takes the next divisor below."),
]
Rule = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=NORM",
        help="The norm, or keep, for layers whose path or role (role:backbone, role:fpn, role:head) matches; "
        "repeatable, the first match wins.",
        show_default=False,
    ),
]
Annotations = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="COCO's JSON file, where --data is its images.", show_default=False),
]
EvalAnnotations = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The same for --eval-data, or more of --data.", show_default=False),
]
DataRoot = Annotated[Path, typer.Option(metavar="FOLDER", help="Where torchvision's data sets are stored.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch torchvision's data set.")]
Workers = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Processes that read images.", show_default="by device")
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Images, alone or in one subfolder for each class.", show_default=False),
]
Images = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Use at most so many of the images.", show_default=False)
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Images in a batch.")]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="N|H,W|native",
        help="Size of the images; by default what the weights were trained with.",
        show_default=False,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(metavar="R,G,B", help="Mean to subtract, for values from 0 to 1; likewise.", show_default=False),
]
Std = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Standard deviation to divide by; likewise.", show_default=False)
]
Device = Annotated[
    str,
    word(
        DEVICES,
        "Where images are run; auto takes a GPU if there is one.",
        also="cuda:N",
        fits=r"cuda:\d+",
    ),
]
FailBelow = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, metavar="VALUE", help="Exit with 3 if the result is below this share.", show_default=False
    ),
]
MaxBad = Annotated[int, typer.Option(min=0, metavar="N", help="Skip so many images that cannot be read.")]
STAND_IN = "|".join(STAND_INS)
Calibrate = Annotated[
    str | None,
    typer.Option(
        metavar=f"FOLDER|{STAND_IN}|none",
        help="Calibrate too: on the unlabelled images of a folder, or on photographs or made inputs in their place.",
        show_default="none",
    ),
]
CalibrateImages = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Calibrate on at most so many images.", show_default="256, or 64 to 256 stand-ins"
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="The file to write.", show_default=False)
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Write a folder of files of at most this size, such as 500MB or 2GB, and their index.",
        show_default=False,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Report = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.html", help="Write a page that shows the result, to send or to print.", show_default=False
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE", help="The original network; by default it is rebuilt from FILE.", show_default=False
    ),
]


def image_size(ctx: typer.Context, text: str | None) -> tuple[int, int] | str | None:
    """One number for a square, `H,W`, or `native`."""
    if text is None or text == "native":
        return text
    sides = _numbers(ctx, "--size", text, int, "224, 480,640 or native")
    if len(sides) > 2:
        raise typer.BadParameter("give one number, or height and width", ctx=ctx, param_hint="--size")
    return sides[0], sides[-1]


def channel_values(ctx: typer.Context, flag: str, text: str | None) -> tuple[float, ...] | None:
    """One number, or one for each colour."""
    return None if text is None else _numbers(ctx, flag, text, float, "0.485,0.456,0.406")


def _numbers(ctx: typer.Context, flag: str, text: str, kind: type, example: str) -> tuple[Any, ...]:
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not like {example}", ctx=ctx, param_hint=flag) from None
    if kind is int and min(values) < 1:
        raise typer.BadParameter(f"every size must be at least 1, got {text!r}", ctx=ctx, param_hint=flag)
    return values


def rules(ctx: typer.Context, texts: list[str] | None) -> list[tuple[str, str]]:
    """`pattern=norm` texts as pairs. The last `=` counts, since a path may hold one."""
    pairs = []
    for text in texts or ():
        pattern, equals, norm = text.rpartition("=")
        if not (equals and pattern and norm):
            raise typer.BadParameter(
                f"{text!r} is not PATTERN=NORM, such as 'layer4.*=frozen'", ctx=ctx, param_hint="--rule"
            )
        pairs.append((pattern, norm))
    return pairs


def groups(ctx: typer.Context, text: str | None) -> int | str | None:
    """A positive number, or `auto`."""
    if text is None or text == "auto":
        return text
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise typer.BadParameter(f"{text!r} is neither a positive number nor auto", ctx=ctx, param_hint="--groups")
    return value


def shard_size(ctx: typer.Context, text: str | None) -> int | None:
    """A number of bytes."""
    from ...files.sharding import parse_size

    if text is None:
        return None
    try:
        if text.strip().isdecimal():  # 3 would be taken for bytes, and make a file of each tensor
            raise OptionError("without a unit")
        return parse_size(text)
    except OptionError:
        why = f"{text!r} is no size such as 500MB, 2GB or 2GiB"
        raise typer.BadParameter(why, ctx=ctx, param_hint="--max-shard-size") from None


def calibration(ctx: typer.Context, text: str | None) -> str | None:
    """What --calibrate names, None for `none`. A number was its meaning once, and is an error."""
    if text is not None and text.isdecimal() and not Path(text).exists():
        raise typer.BadParameter(
            f"{text!r} is no folder; the number of images is --calibrate-images {text}",
            ctx=ctx,
            param_hint="--calibrate",
        )
    return None if text == "none" else text


def stands_in(place: str) -> bool:
    """Whether that is a word for normswap's own images: a folder of this name goes before."""
    return place in STAND_INS and not Path(place).is_dir()


def eps(ctx: typer.Context, text: str | None) -> float | str | None:
    """A finite number from 0, or `auto`."""
    if text is None or text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"{text!r} is neither a number from 0 nor auto", ctx=ctx, param_hint="--eps")
    return value


def check_alone(ctx: typer.Context, names: Iterable[str], other: str) -> None:
    """Raise the error of a wrong call for options, by their names, that were given without the one they go with."""
    given = [name for name in names if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise usage(ctx, f"{flags} go{'es' * (len(given) == 1)} with {other.split()[0]}: add {other}")


def choice(ctx: typer.Context, flag: str, value: str, allowed: tuple[str, ...]) -> str:
    """One of a few words."""
    if value not in allowed:
        near = did_you_mean(value, allowed)
        text = f"{value!r} is not one of {', '.join(allowed)}" + (f". {near}" if near else "")
        raise typer.BadParameter(text, ctx=ctx, param_hint=flag)
    return value


def usage(ctx: typer.Context, message: str) -> Exception:
    """An error of the call as a whole: exit code 2."""
    error: Exception = UsageError(message, ctx)
    return error
