"""SOURCE on the command line -> a network: one that is built, or one from a file that normswap wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ...errors import CheckpointError, SourceError
from ..terminal.output import Output
from ..terminal.suggestions import repeated
from . import options

if TYPE_CHECKING:
    from torch import nn

    from ...sources.provenance import Weights
    from ...sources.spec import Source


@dataclass(frozen=True)
class SourceRequest:
    """What the user said about one network. source: what builds it, where `text` is a converted file."""

    text: str
    weights: str | None = None
    args: tuple[str, ...] = ()
    trust_pickle: bool = False
    trust_code: bool = False
    allow_nonfinite: bool = False
    seed: int = 0
    source: str | None = None

    @classmethod
    def of(cls, ctx: typer.Context, text: str) -> SourceRequest:
        """`text`, with what the command's options say of it."""
        said = ctx.params
        same = {name: said[name] for name in ("weights", "trust_pickle", "trust_code", "allow_nonfinite", "seed")}
        return cls(text, args=tuple(said["arg"] or ()), source=said["built_by"], **same)

    def built_with(self) -> Iterable[Any]:
        """Values of --arg."""
        from ...sources.resolve import parse_args

        return parse_args(list(self.args)).values()

    def words(self) -> list[str]:
        """The words of a command line that ask for the same network."""
        given = {"--weights": self.weights, "--source": self.source}
        found = [self.text, *(word for flag, value in given.items() if value is not None for word in (flag, value))]
        found += [word for pair in self.args for word in ("--arg", pair)]
        found += [
            "--" + name.replace("_", "-")
            for name in ("trust_pickle", "trust_code", "allow_nonfinite")
            if getattr(self, name)
        ]
        return [*found, *(["--seed", str(self.seed)] if self.seed else [])]


@dataclass(frozen=True)
class ResolvedSource:
    """Where a network comes from: `source` builds it; `file`, which normswap wrote, holds its weights and the swap.

    asked: the weights to build it with. weights: those that it has, once it is opened.
    """

    source: Source | None
    file: Path | None = None
    asked: str | None = None
    weights: Weights | None = None

    def __str__(self) -> str:
        return str(self.file or self.source)

    @property
    def stem(self) -> str:
        """What results are named after."""
        if self.source is not None:
            return self.source.stem
        return "model" if self.file is None else named_after(self.file).name

    @property
    def made_with(self) -> Weights | None:
        """The weights of the original network, if they are known."""
        from ...sources.provenance import Weights

        return Weights.of(self.source.to_dict()) if self.source is not None else None

    @property
    def told(self) -> str:
        """The network and its weights, for a line of a page."""
        if self.file is None and self.source is None:
            return str(self.weights)
        return str(self) if self.weights is None or self.file is not None else f"{self} ({self.weights})"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "file": None if self.file is None else str(self.file),
            "source": None if self.source is None else self.source.to_dict(),
            "weights": None if self.weights is None else self.weights.to_dict(),
        }


def named_after(file: str | Path) -> Path:
    """Where results of a converted file go, and what they begin with: its name, or of shards that of their folder."""
    path = Path(file)
    if not (path.is_dir() or path.name.endswith(".index.json")):
        return path.with_name(path.stem)
    folder = path if path.is_dir() else path.parent
    return folder if folder.name not in ("", "..") else Path(folder.resolve().name or "model")


def converted_file(text: str) -> Path | None:
    """The path, if SOURCE names, by its name or content, a file of normswap's or a folder or index of its shards."""
    path = Path(text)
    if not path.exists():
        return None
    if path.suffix == ".safetensors" and path.is_file():
        return path
    from ...checkpoint.manifest import is_ours

    return path if is_ours(path) else None


def check_converted(text: str, what: str, hint: str) -> None:
    """Raise SourceError for what is not there, CheckpointError for what is not converted: `hint`, for a network."""
    if converted_file(text) is not None:
        return
    from ...sources.resolve import parse

    try:
        parse(text)
    except SourceError as error:
        if not Path(text).exists():
            raise
        hint = error.hint or hint
    raise CheckpointError(f"{what}{text} is not a file that normswap wrote", hint=hint)


def locate(ctx: typer.Context, wanted: SourceRequest, *, default_weights: str = "DEFAULT") -> ResolvedSource:
    """Find out what SOURCE names, without building it.

    Raises NormswapError, or a usage error for options that do not go with a converted file.
    """
    from ...checkpoint.manifest import read_manifest
    from ...checkpoint.saving import source_told
    from ...sources.provenance import Weights
    from ...sources.resolve import parse, parse_args
    from ...sources.spec import Source

    file = converted_file(wanted.text)
    args = parse_args(list(wanted.args))
    if file is None:
        if wanted.source is not None:
            raise options.usage(ctx, f"--source goes with a file that normswap wrote; {wanted.text} is none")
        return ResolvedSource(parse(wanted.text, args), asked=wanted.weights or default_weights)
    for flag, given in (("--weights", wanted.weights), ("--arg", wanted.args)):
        if given and (flag == "--weights" or wanted.source is None):
            raise options.usage(ctx, f"{flag} goes with a network to build; {file} brings its own weights")
    from ...conversion.history import Entry, FineTuned

    manifest = read_manifest(file)
    values = manifest["source"]
    trained = any(isinstance(Entry.from_dict(entry), FineTuned) for entry in manifest["history"])
    made_with = Weights.of(values)
    held = Weights(str(file), random=made_with is not None and made_with.random and not trained)
    if wanted.source is not None:
        source = source_told(wanted.source, manifest)
        return ResolvedSource(replace(source, args=args) if args else source, file, weights=held)
    return ResolvedSource(None if values is None else Source.from_dict(values), file, weights=held)


def files_read(*asked: tuple[ResolvedSource, SourceRequest] | None) -> list[Path]:
    """The files and folders that these networks are made from, which no result of the same command may replace."""
    found: list[str | Path | None] = []
    for origin, wanted in filter(None, asked):
        found += [origin.file, wanted.weights, *(value for value in wanted.built_with() if isinstance(value, str))]
        if origin.source is not None and origin.source.kind in ("file", "hf"):  # hf: perhaps a folder
            name = origin.source.name
            found.append(name.rpartition(":")[0] if origin.source.kind == "file" else name)
    return [path for path in (Path(place) for place in found if place) if path.exists()]


def open_network(
    origin: ResolvedSource, wanted: SourceRequest, out: Output, *, values: bool = True, warn: bool = True
) -> tuple[nn.Module, ResolvedSource]:
    """Build or load it. Returns it, and the origin with what building has shown. warn: of random weights.

    values=False leaves weights out that would have to be downloaded; a local checkpoint is read all the same.
    """
    if origin.file is not None:
        out.step(f"loading {origin}")
        from ...checkpoint.saving import load

        told = None if wanted.source is None else origin.source
        model = load(origin.file, source=told, trust_code=wanted.trust_code, allow_nonfinite=wanted.allow_nonfinite)
    else:
        out.step(f"building {origin}")
        model, origin = _built(origin, wanted, out, values)
    if warn and origin.weights is not None and origin.weights.random:
        out.note(_warning(origin, wanted))
    return model, origin


def _built(
    origin: ResolvedSource, wanted: SourceRequest, out: Output, values: bool
) -> tuple[nn.Module, ResolvedSource]:
    import torch

    from ...sources.provenance import NOT_READ, weights_of
    from ...sources.resolve import build, names_a_file, outline

    if origin.source is None:
        raise ValueError("an origin has a file or a source")
    torch.manual_seed(wanted.seed)
    asked = origin.asked or "none"
    local = asked != "none" and (origin.source.runs_code or names_a_file(origin.source, asked))
    if not (values or local):
        model, source = outline(origin.source, asked)
        return model, replace(origin, source=source, weights=NOT_READ)
    casts: list[str] = []
    several: list[list[str]] = []
    model, source = build(
        origin.source,
        asked,
        trust_pickle=wanted.trust_pickle,
        allow_nonfinite=wanted.allow_nonfinite,
        progress=out.live,
        when_cast=casts.append,
        when_several=several.append,
    )
    for first, *others in several:
        other = f"torch.save(torch.load({asked!r})[{others[0]!r}], 'other.pth') makes a file of another"
        out.note(f"{asked} holds {first} and {', '.join(others)}: {first} is taken; in Python, {other}")
    if casts:
        out.note(f"{asked} is cast from {casts[0]}: the network keeps the dtype that {source} makes it with")
    file = asked not in ("none", "DEFAULT") and names_a_file(origin.source, asked)
    if wanted.weights is None and source.runs_code:
        asked = "DEFAULT"  # its code alone decides, whatever a command asks of the networks of libraries
    weights = weights_of(model, source, asked, file=file, seed=wanted.seed, cast=next(iter(casts), None))
    return model, replace(origin, source=replace(source, weights=weights.to_dict()), weights=weights)


def _warning(origin: ResolvedSource, wanted: SourceRequest) -> str:
    if origin.file is not None:
        return f"{origin} was made from random weights"
    if wanted.weights is not None or origin.asked == "none":
        return f"{origin} has random weights"
    return f"{origin} has random weights, its factory's own; --weights FILE gives it trained ones"


def open_original(
    ctx: typer.Context, wanted: SourceRequest, made: ResolvedSource, of_made: SourceRequest, out: Output
) -> tuple[nn.Module, ResolvedSource]:
    """The network that the user names as the one that the file `made` was converted from.

    A factory that draws its weights at random gives other ones each time; its original is then restored from the file.
    Raises WeightsError, with the command that works, where that cannot be done.
    """
    from ...errors import RevertError, WeightsError

    model, origin = open_network(locate(ctx, wanted), wanted, out, warn=False)
    theirs, weights = made.made_with, origin.weights
    drawn = weights is not None and weights.random
    fitting = made.file is None or theirs is None or weights is None or theirs.digest in (None, weights.digest)
    if drawn and (fitting or origin.file is not None or wanted.weights is not None or not _same(origin, made)):
        out.note(_warning(origin, wanted))  # else it is not used
    if made.file is None or theirs is None or weights is None or origin.file is not None:
        return model, origin
    if theirs.digest is None or weights.digest == theirs.digest:
        return model, origin
    if not _same(origin, made):
        out.note(f"{made} was made from {made.source} ({theirs}), not from {origin.told}")
        return model, origin
    if not weights.random or wanted.weights is not None:
        out.note(f"{origin.told}; {made} was made from other weights: {theirs}")
        return model, origin
    try:
        model = original_of(open_network(made, of_made, out, warn=False)[0], made, "")
    except RevertError as error:
        way = "Its random weights are gone; --weights FILE takes a checkpoint of them."
        if theirs.given is not None:
            way = "Name its weights: " + repeated(ctx, drop=("--weights",), add=("--weights", theirs.given))
        raise WeightsError(f"{origin.told}, not what {made} was made from: {theirs}", hint=way) from error
    out.note(f"{origin} has other weights each time it is built; its original is restored from {made}")
    return model, restored(made)


def restored(made: ResolvedSource) -> ResolvedSource:
    """The original of a file that normswap wrote, as the file's record restores it."""
    from ...sources.provenance import Weights

    theirs = made.made_with
    name = f"{'' if theirs is None else f'{theirs}; '}as it was before the conversion of {made}"
    return ResolvedSource(made.source, weights=replace(theirs or Weights(""), name=name))


def _same(one: ResolvedSource, other: ResolvedSource) -> bool:
    """Whether both are built by the same code with the same arguments."""
    if one.source is None or other.source is None:
        return False
    mine, theirs = (
        (source.kind, Path(source.name).resolve() if source.kind == "file" else source.name, dict(source.args))
        for source in (one.source, other.source)
    )
    return mine == theirs


@contextmanager
def on_device(name: str, *models: nn.Module | None) -> Iterator[None]:
    """The networks on a device; afterwards they are on the CPU, where files are written from. Raises OptionError."""
    from ...machine.devices import device_of

    device = device_of(name)
    try:
        for model in models:
            if model is not None:
                model.to(device)
        yield
    finally:
        for model in models:
            if model is not None:
                model.cpu()


def original_of(model: nn.Module, origin: ResolvedSource, instead: str, *, approximate: bool = False) -> nn.Module:
    """The network that a converted one was made from. Changes the one given.

    Raises RevertError, with `instead` as what to do, when it cannot be restored: by its record, and by the digest of
    its weights, which tells changes that undo as cleanly as none, such as doubled weights.
    """
    from ...conversion.revert import revert
    from ...errors import RevertError
    from ...sources.weights import digest_of

    try:
        original = revert(model, strict=not approximate)
    except RevertError as error:
        raise RevertError(error.message, hint=instead) from error
    theirs = origin.made_with
    if not approximate and theirs is not None and theirs.digest not in (None, digest_of(original.state_dict())):
        raise RevertError(
            f"the weights changed since the conversion; {origin} does not lead back exactly", hint=instead
        )
    return original
