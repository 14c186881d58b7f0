"""SOURCE -> network: torchvision names, `timm:NAME`, `hf:ID`, `package.module:factory`, `file.py:factory`.

Architectures are built without weights, on no memory; weights are memory-mapped into them. One file a kind of source.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from ..errors import Fix, NormswapError, OptionError, SourceError, Text, did_you_mean
from ..modules.wrappers import unwrapped
from . import timm, torchvision, transformers, user_code
from .shards import whole_file
from .spec import FORMS, Source, build_error, near_file
from .weights import State, check_finite, empty_parameters, has_empty_parameters, in_parts, load_state, read_state

_WEIGHTS = (".pth", ".pt", ".th", ".ckpt", ".bin", ".pkl", ".tar")
_FILES = (".safetensors", ".json", *_WEIGHTS)


def parse(text: str, args: Mapping[str, Any] | None = None) -> Source:
    """Read a SOURCE. Raises SourceError, with near matches, for one that cannot be."""
    args = dict(args or {})
    prefix, _, rest = text.partition(":")
    if prefix in ("timm", "hf") and rest:
        return Source(prefix, rest, args)
    file, _, factory = text.rpartition(":")
    if file.endswith(".py") and factory:  # a colon may be in the folder's name
        return Source("file", text, args)
    if rest and all(part.isidentifier() for part in (*prefix.split("."), *rest.split("."))):
        return Source("factory", text, args)
    if rest:
        raise SourceError(
            f"{text!r} is no source",
            hint=FORMS,
        )
    if text.endswith(".py"):
        raise SourceError(f"{text} names a file but no factory in it", hint=f"For example {text}:build_model")
    if text not in torchvision.names():
        _unknown_name(text)
    return Source("torchvision", text, args)


def parse_args(pairs: list[str]) -> dict[str, Any]:
    """`key=value` texts as keyword arguments; values as Python literals where they are, else as text."""
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise OptionError(Text(Fix("args"), f" needs KEY=VALUE, got {pair!r}"))
        try:
            result[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            result[key] = value
    return result


def build(
    source: Source,
    weights: str = "DEFAULT",
    *,
    trust_pickle: bool = False,
    allow_nonfinite: bool = False,
    progress: bool = True,
    when_cast: Callable[[str], None] | None = None,
    when_several: Callable[[list[str]], None] | None = None,
) -> tuple[nn.Module, Source]:
    """Build the network with its weights. Returns it, and the source with what building it has shown.

    weights: `DEFAULT` (a named model's best, a factory's own), `none` (random), a checkpoint file, or the name of
    one of the model's published weights, such as `IMAGENET1K_V1`.
    when_cast: told `float16 to float32`, say, where a file's values are not of the network's dtype, which stays.
    when_several: as `sources.weights.read_state` takes it.

    Raises SourceError or WeightsError.
    """
    if weights == "none":
        source = _resolved(source)
        return build_full(source), source
    if names_a_file(source, weights):
        with user_code.importable(source) if trust_pickle else nullcontext():  # what is pickled may be of that code
            state = read_state(
                weights, trust_pickle=trust_pickle, allow_nonfinite=allow_nonfinite, when_several=when_several
            )
        source = _resolved(source)
        if source.kind == "torchvision" and (entry := torchvision.published_file(source.name, weights)):
            return torchvision.with_state(source, entry, state)
        model = build_empty(source)
        if (cast := load_state(model, state, str(weights))) is not None and when_cast is not None:
            when_cast(cast)
        return _completed(model, source, state, weights), source
    model, source = _pretrained(source, weights, progress)
    if not allow_nonfinite:
        check_finite(model.state_dict(), f"the weights of {source}")
    return model, source


def outline(source: Source, weights: str = "none") -> tuple[nn.Module, Source]:
    """The architecture that goes with `weights`, without their values: no weights are downloaded or read.

    Returns what `build` returns. Raises SourceError or WeightsError.
    """
    source = _resolved(source)
    if source.kind == "torchvision" and weights != "none":
        local = names_a_file(source, weights)
        find = torchvision.published_file if local else torchvision.published
        if (entry := find(source.name, weights)) is not None:
            source = replace(source, variant=entry.name)
    return build_empty(source), source


def build_empty(source: Source) -> nn.Module:
    """The architecture alone: parameters on the meta device, buffers real."""
    try:
        with empty_parameters():
            return _built(source)
    except SystemExit as error:
        raise build_error(source, error) from error
    except Exception:  # perhaps the builder computes with its parameters' values, as `detection.detector` does
        return build_full(source)


def build_full(source: Source) -> nn.Module:
    """Run the source's builder without weights: what it initialises is random. Raises SourceError."""
    try:
        return _built(source)
    except NormswapError:
        raise
    except (Exception, SystemExit) as error:  # a stranger's code raises whatever it likes
        raise build_error(source, error) from error


def _built(source: Source) -> nn.Module:
    builder: Callable[[Source], Any] = {
        "torchvision": torchvision.architecture,
        "timm": timm.architecture,
        "hf": transformers.architecture,
        "factory": user_code.architecture,
        "file": user_code.architecture,
    }[source.kind]
    model = builder(source)
    if not isinstance(model, nn.Module):
        raise SourceError(f"{source} returned {type(model).__name__}, not a torch.nn.Module")
    return unwrapped(model)


def _completed(model: nn.Module, source: Source, state: State, origin: str) -> nn.Module:
    """Where values are missing that no state dict holds, build the network in full and load it again."""
    if not has_empty_parameters(model):
        return model
    model = build_full(source)
    load_state(model, state, origin)
    return model


def names_a_file(source: Source, weights: str) -> bool:
    """Whether `build` takes these weights for a checkpoint file."""
    if weights == "DEFAULT":
        return False
    path = Path(weights)
    looks = path.suffix in _FILES or "/" in weights
    return looks or path.exists() or source.kind in ("factory", "file")


def _pretrained(source: Source, weights: str, progress: bool) -> tuple[nn.Module, Source]:
    if source.runs_code:
        return build_full(source), source
    library = {"torchvision": torchvision, "timm": timm, "hf": transformers}[source.kind]
    return library.pretrained(source, weights, progress)


def _resolved(source: Source) -> Source:
    """With what is needed to rebuild it without a hub."""
    library = {"timm": timm, "hf": transformers}.get(source.kind)
    return source if library is None else library.resolved(source)


def missing_file(text: str) -> SourceError | None:
    """What to say of a SOURCE that is a file by its name, and is not there; None for any other."""
    path = Path(text)
    if not _is_path(text) or path.exists():
        return None
    ways = [near_file(path) or FORMS]
    if text.count("/") == 1 and not path.suffix and text[0] not in "./~":
        ways.insert(0, f"A model of the Hugging Face hub is hf:{text}")
    return SourceError(f"{text} does not exist", hint="\n".join(ways))


def _is_path(text: str) -> bool:
    return "/" in text.rstrip("/") or text.startswith(("/", ".")) or Path(text).suffix in _FILES


def _unknown_name(text: str) -> NoReturn:
    if (missing := missing_file(text)) is not None:
        raise missing
    if text and Path(text).exists():
        raise _no_network(text)
    near = did_you_mean(text, torchvision.names())
    raise SourceError(f"unknown model {text!r}", hint="\n".join([*([near] if near else []), FORMS]))


def _no_network(text: str) -> SourceError:
    """What to say of a file or folder that is there."""
    path = Path(text)
    if os.path.isdir(path) and (path / "config.json").is_file():
        return SourceError(f"{text} is a folder, and no source", hint=f"If transformers wrote it, it is hf:{text}")
    if path.suffix in _WEIGHTS or whole_file(path) != path or in_parts(path):
        way = f"A checkpoint needs its architecture: normswap convert SOURCE --weights {text}\n{FORMS}"
        return SourceError(f"{text} holds weights alone, and no network that they belong to", hint=way)
    return SourceError(f"{text} is a {'folder' if path.is_dir() else 'file'}, and no network", hint=FORMS)
