"""Find out where a network that the caller built came from, so that a file of it can be loaded without the caller."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..conversion.apply import apply
from ..conversion.bound import bind
from ..conversion.undo_record import Undo
from ..errors import NormswapError
from ..planning.plan import Plan
from ..sources.resolve import build_empty
from ..sources.spec import Source


def source_of(model: nn.Module, plan: Plan, undo: Undo) -> dict[str, Any] | None:
    """The source of a converted network, if it is a torchvision, timm or transformers architecture; else None.

    A candidate counts only if, rebuilt and converted by the same plan, it is the same: names, shapes, modules with
    their options (a stride changes no shape), and the numbers, texts and flags among their attributes.
    """
    for candidate in _candidates(model):
        if _is_source(candidate, model, plan, undo):
            return candidate.to_dict()
    return None


def _candidates(model: Any) -> Iterator[Source]:
    library = type(model).__module__.partition(".")[0]
    if library == "transformers" and hasattr(model, "config"):
        config = {"class": type(model).__name__, **model.config.to_dict()}
        yield Source("hf", model.config.name_or_path or type(model).__name__, config=config)
    elif isinstance(getattr(model, "pretrained_cfg", None), dict):
        name = str(model.pretrained_cfg.get("architecture", ""))
        for args in _with_classes(model):
            yield Source("timm", name, args)
    elif library == "torchvision":
        yield from _torchvision_candidates(model)


def _torchvision_candidates(model: nn.Module) -> Iterator[Source]:
    from torchvision.models import get_model_builder, get_model_weights, list_models

    for name in list_models():
        if get_model_builder(name).__module__ != type(model).__module__:
            continue
        if _layers(build_empty(Source("torchvision", name))) != _layers(model):
            continue
        for args in _with_classes(model):
            yield Source("torchvision", name, args)
        for weights in get_model_weights(name):  # weights may decide the structure: frozen norms, their eps
            yield Source("torchvision", name, {}, weights.name)


def _layers(model: nn.Module) -> int:
    """What no swap and no number of classes changes: it rules most candidates out by one build."""
    return sum(isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) for m in nn.Module.modules(model))


def _with_classes(model: nn.Module) -> Iterator[dict[str, Any]]:
    yield {}
    if isinstance(count := getattr(model, "num_classes", None), int):  # timm's; 0 where the head was taken off
        yield {"num_classes": count}
    heads = [m for m in nn.Module.modules(model) if isinstance(m, (nn.Linear, nn.Conv2d))]
    if heads:
        last = heads[-1]
        yield {"num_classes": last.out_features if isinstance(last, nn.Linear) else last.out_channels}


def _is_source(source: Source, model: nn.Module, plan: Plan, undo: Undo) -> bool:
    try:
        built = build_empty(source)
        if type(built) is not type(model):
            return False
        root, undone = apply(built, bind(built, plan), keep_undo=True, structure_only=True)
    except (NormswapError, KeyError):
        return False
    originals = [repr(n.module) for n in undone.norms] == [repr(n.module) for n in undo.norms] or not undo.norms
    return originals and repr(root) == repr(model) and _shapes(root) == _shapes(model) and _same_values(root, model)


def _same_values(built: nn.Module, model: nn.Module) -> bool:
    """Whether the attributes that the built network has are the same in the other, which may have more."""
    return all(
        other.__dict__.get(name) == value
        for one, other in zip(nn.Module.modules(built), nn.Module.modules(model), strict=True)
        for name, value in one.__dict__.items()
        if name != "training" and _plain(value)
    )


def _plain(value: Any) -> bool:
    return all(map(_plain, value)) if isinstance(value, tuple) else isinstance(value, (bool, int, float, str))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
