"""timm's models."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import SourceError, WeightsError, did_you_mean
from ._offline import stop_retries
from .spec import Source, offline_error


def architecture(source: Source) -> nn.Module:
    """Build the model without weights."""
    return _timm().create_model(source.name, pretrained=False, **source.args)


def resolved(source: Source) -> Source:
    """The source itself. Raises SourceError, with near matches, for a name timm does not know."""
    timm = _timm()
    if timm.is_model(source.name.partition(".")[0]):
        return source
    raise SourceError(f"timm has no model {source.name!r}", hint=did_you_mean(source.name, timm.list_models()))


def pretrained(source: Source, weights: str, progress: bool) -> tuple[nn.Module, Source]:
    """The model with published weights; `weights` names one of its tags, such as `a1_in1k`."""
    timm = _timm()
    source = resolved(source)
    name = source.name if weights == "DEFAULT" else f"{source.name.partition('.')[0]}.{weights}"
    if weights != "DEFAULT" and weights not in (tags := _tags(name)):
        raise WeightsError(
            f"timm's {source.name} has no weights named {weights!r}; it has {', '.join(tags) or 'none'}",
            hint=did_you_mean(weights, tags),
        )
    source = replace(source, name=name)
    stop_retries()
    try:
        return timm.create_model(name, pretrained=True, **source.args), source
    except Exception as error:  # hub, network and file errors of several libraries
        raise offline_error(source, "its pretrained weights from the Hugging Face hub", error) from error


def _tags(name: str) -> list[str]:
    base = name.partition(".")[0]
    return [n.partition(".")[2] for n in _timm().list_pretrained(f"{base}.*")]


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise SourceError("timm is not installed", hint='pip install "normswap[timm]"') from error
