"""torchvision's models: built without weights, or with published ones memory-mapped from torch's hub folder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import torch
from torch import nn

from ..errors import Fix, Text, WeightsError, did_you_mean
from .spec import Source, build_error, offline_error
from .weights import State, empty_parameters, filled_parameters, read_state

MIRROR = "NORMSWAP_WEIGHTS_MIRROR"  # a folder, or its URL, where the files of download.pytorch.org lie by their names


def names() -> list[str]:
    """Every model name torchvision knows."""
    from torchvision.models import list_models

    return list_models()


def architecture(source: Source) -> nn.Module:
    """Run the model's builder without weights; `variant` decides what a builder reads off its weights."""
    from torchvision.models import get_model_builder

    builder = get_model_builder(source.name)
    known = inspect.signature(builder).parameters
    arguments: dict[str, Any] = {"weights": None, **source.args}
    if "weights_backbone" in known:
        arguments.setdefault("weights_backbone", None)
    if source.name in ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3"):
        arguments.setdefault("init_weights", False)  # minutes of truncated normal draws
    if source.variant is None:
        return builder(**arguments)
    # The builder reads num_classes, eps and frozen norms off the weights; the values themselves are left out.
    arguments["weights"] = published(source.name, source.variant)
    arguments.pop("init_weights", None)
    with _published_state(_Withheld()):
        return builder(**arguments)


def pretrained(source: Source, weights: str, progress: bool) -> tuple[nn.Module, Source]:
    """The model with published weights, downloaded if they are not in torch's hub folder yet."""
    entry = published(source.name, weights)
    return with_state(source, entry, _downloaded(entry.url, source, progress))


def with_state(source: Source, entry: Any, state: State) -> tuple[nn.Module, Source]:
    """The model as its builder makes it from published weights, whose values `state` holds."""
    from torchvision.models import get_model_builder

    source = replace(source, variant=entry.name)
    try:
        with empty_parameters(), _published_state(state):
            model = get_model_builder(source.name)(weights=entry, **source.args)
    except Exception as error:  # a builder given arguments that do not go with the weights
        raise build_error(source, error) from error
    return model, source


def published(name: str, weights: str) -> Any:
    """The entry of torchvision's weights enum. Raises WeightsError, with a near match, for an unknown name."""
    from torchvision.models import get_model_weights

    try:
        members = get_model_weights(name)
        return members.DEFAULT if weights == "DEFAULT" else members[weights]
    except (KeyError, AttributeError, ValueError):
        known = [w.name for w in get_model_weights(name)]
    raise WeightsError(
        f"{name} has no weights named {weights!r}; it has {', '.join(known) or 'none'}",
        hint=did_you_mean(weights, known) or Text(Fix("weights", "none"), " builds it with random weights."),
    )


def published_file(name: str, file: str) -> Any:
    """The entry of the weights enum whose file this is, by the file's name; None for any other file.

    Such a file needs its own builder: parameters that are renamed, frozen norms, their eps.
    """
    from torchvision.models import get_model_weights

    return next((w for w in get_model_weights(name) if w.url.rpartition("/")[2] == Path(file).name), None)


def _downloaded(url: str, source: Source, progress: bool) -> State:
    """The checkpoint from torch's hub folder, downloaded into it if need be."""
    file_name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if not path.exists():
        mirror = os.environ.get(MIRROR)
        if mirror and "://" not in mirror:
            mirror = Path(mirror).resolve().as_uri()
        origin = f"{mirror.rstrip('/')}/{file_name}" if mirror else url
        expected = file_name.rpartition("-")[2].partition(".")[0] if "-" in file_name else None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(origin, str(path), expected, progress=progress)
        except (OSError, RuntimeError, ValueError) as error:  # the network, the hash, the URL
            if isinstance(error, HTTPError):
                error.close()
            raise offline_error(source, f"{origin} into {path}", error) from error
    return read_state(path, allow_nonfinite=True)  # the caller looks at the whole model


class _Withheld(dict[str, Any]):
    """Stands for weights that are not wanted: loading it does nothing."""


@contextmanager
def _published_state(state: dict[str, Any]) -> Iterator[None]:
    """Let torchvision's builders get `state` instead of downloading; it is assigned, not copied."""
    from torchvision.models._api import WeightsEnum

    module: Any = nn.Module
    get, load = WeightsEnum.get_state_dict, module.load_state_dict

    def load_state_dict(self: nn.Module, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if isinstance(values, _Withheld):
            return None
        with filled_parameters():
            return load(self, values, *args, **{**kwargs, "assign": True})

    WeightsEnum.get_state_dict = lambda *args, **kwargs: state
    module.load_state_dict = load_state_dict
    try:
        yield
    finally:
        WeightsEnum.get_state_dict = get
        module.load_state_dict = load
