"""transformers' vision models, by hub ID or local folder. The config goes into the source: no hub is needed again."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import Fix, SourceError, Text, WeightsError, first_line
from ._offline import stop_retries
from .spec import Source, offline_error


def architecture(source: Source) -> nn.Module:
    """Build the model from its config, without weights."""
    transformers = _transformers()
    source = resolved(source)
    values = {**(source.config or {}), **source.args}
    name = values.pop("class")
    if "use_pretrained_backbone" in values:
        values["use_pretrained_backbone"] = False
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    if name == "AutoModel":
        return transformers.AutoModel.from_config(config)
    return _class(transformers, source)(config)


def _class(transformers: Any, source: Source) -> Any:
    name = (source.config or {})["class"]
    try:
        return getattr(transformers, name)
    except AttributeError as error:
        raise SourceError(
            f"{source} is a {name}, which transformers {transformers.__version__} does not have"
        ) from error


def resolved(source: Source) -> Source:
    """With the config and the class, read from the hub or a folder once."""
    if source.config is not None:
        return source
    stop_retries()
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(source.name)
    except Exception as error:  # hub, network and file errors of several libraries
        raise SourceError(
            f"the configuration of {source} cannot be read ({first_line(error)})",
            hint="Ways out: hf:FOLDER with a copy of the model, or one run with a connection, which keeps a copy.",
        ) from error
    architecture = (config.architectures or ["AutoModel"])[0]
    return replace(source, config={"class": architecture, **config.to_dict()})


def pretrained(source: Source, weights: str, progress: bool) -> tuple[nn.Module, Source]:
    """The model with the weights of its hub ID or folder."""
    transformers = _transformers()
    if weights != "DEFAULT":
        raise WeightsError(Text("hf: models take ", Fix("weights"), f" DEFAULT, none or FILE, got {weights!r}"))
    source = resolved(source)
    cls = _class(transformers, source)
    try:
        return cls.from_pretrained(source.name, **source.args), source
    except Exception as error:  # hub, network and file errors of several libraries
        raise _hub_error(source, error) from error


def _hub_error(source: Source, error: Exception) -> WeightsError:
    return offline_error(source, f"{source.name!r} from the Hugging Face hub", error)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise SourceError("transformers is not installed", hint='pip install "normswap[transformers]"') from error
