"""SOURCE -> network: torchvision names, `timm:NAME`, `hf:ID`, `package.module:factory`, `file.py:factory`.

A source is pure data that goes into a converted file's manifest, so that the architecture can be rebuilt anywhere.
Architectures are built without weights, on no memory; weights are memory-mapped into them.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import socket
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from .errors import CheckpointError, SourceError, WeightsError
from .inventory import first_line
from .weights import State, check_finite, empty_parameters, has_empty_parameters, load_state, read_state

KINDS = ("torchvision", "timm", "hf", "factory", "file")
MIRROR = "NORMSWAP_WEIGHTS_MIRROR"


@dataclass(frozen=True)
class Source:
    """Where an architecture comes from. JSON values only.

    kind: one of KINDS. name: a model's name, an ID or folder, or a module's or file's factory as `PLACE:FACTORY`.
    args: keyword arguments of the builder. variant: named weights that decide the architecture too (torchvision's
    COCO weights have a frozen BN). config: a transformers config and class, so that no hub is needed again.
    """

    kind: str
    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    variant: str | None = None
    config: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        prefix = {"timm": "timm:", "hf": "hf:"}.get(self.kind, "")
        return prefix + self.name

    @property
    def stem(self) -> str:
        """A file name's beginning for results: the last part of the name."""
        name = self.name.rpartition(":")[2] if self.kind in ("factory", "file") else self.name
        return name.rstrip("/").rpartition("/")[2] or "model"

    @property
    def runs_code(self) -> bool:
        """Whether building it runs code that is in no library normswap knows."""
        return self.kind in ("factory", "file")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "kind": self.kind,
            "name": self.name,
            "args": dict(self.args),
            "variant": self.variant,
            "config": self.config,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Source:
        """The inverse of `to_dict`. Raises CheckpointError for anything else."""
        try:
            source = cls(**values)
        except TypeError as error:
            raise CheckpointError(f"the manifest's source cannot be read: {error}") from error
        if source.kind not in KINDS:
            raise CheckpointError(f"the manifest's source is of an unknown kind, {source.kind!r}")
        return source


def parse(text: str, args: Mapping[str, Any] | None = None) -> Source:
    """Read a SOURCE. Raises SourceError, with near matches, for one that cannot be."""
    args = dict(args or {})
    prefix, _, rest = text.partition(":")
    if prefix in ("timm", "hf") and rest:
        return Source(prefix, rest, args)
    if rest and prefix.endswith(".py"):
        return Source("file", text, args)
    if rest and all(part.isidentifier() for part in prefix.split(".")):
        return Source("factory", text, args)
    if rest:
        raise SourceError(
            f"{text!r} is no source",
            hint="A source is a torchvision name, timm:NAME, hf:ID, package.module:factory or path/to/file.py:factory.",
        )
    if text.endswith(".py"):
        raise SourceError(f"{text} names a file but no factory in it", hint=f"For example {text}:build_model")
    if text not in _torchvision_names():
        _unknown_name(text)
    return Source("torchvision", text, args)


def parse_args(pairs: list[str]) -> dict[str, Any]:
    """`key=value` texts as keyword arguments; values as Python literals where they are, else as text."""
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise SourceError(f"--arg needs key=value, got {pair!r}")
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
) -> tuple[nn.Module, Source]:
    """Build the network with its weights. Returns it, and the source with what building it has shown.

    weights: `DEFAULT` (a named model's best, a factory's own), `none` (random), a checkpoint file, or the name of
    one of the model's published weights, such as `IMAGENET1K_V1`.

    Raises SourceError or WeightsError.
    """
    if weights == "none":
        source = _resolved(source)
        return _architecture(source), source
    if _names_a_file(source, weights):
        state = read_state(weights, trust_pickle=trust_pickle, allow_nonfinite=allow_nonfinite)
        source = _resolved(source)
        model = build_empty(source)
        load_state(model, state, str(weights))
        return _completed(model, source, state, weights), source
    model, source = _PRETRAINED[source.kind](source, weights, progress)
    if not allow_nonfinite:
        check_finite(model.state_dict(), f"the weights of {source}")
    return model, source


def outline(source: Source, weights: str = "none") -> tuple[nn.Module, Source]:
    """The architecture that goes with `weights`, without their values: no weights are downloaded or read.

    Returns what `build` returns. Raises SourceError or WeightsError.
    """
    source = _resolved(source)
    if source.kind == "torchvision" and weights != "none" and not _names_a_file(source, weights):
        source = replace(source, variant=_torchvision_weights(source.name, weights).name)
    return build_empty(source), source


def build_empty(source: Source) -> nn.Module:
    """The architecture alone: parameters on the meta device, buffers real."""
    try:
        with empty_parameters():
            return _architecture(source)
    except (NotImplementedError, RuntimeError):  # a builder that computes with its parameters' values
        return _architecture(source)


def _completed(model: nn.Module, source: Source, state: State, origin: str) -> nn.Module:
    """Where values are missing that no state dict holds, build the network in full and load it again."""
    if not has_empty_parameters(model):
        return model
    model = _architecture(source)
    load_state(model, state, origin)
    return model


def _names_a_file(source: Source, weights: str) -> bool:
    if weights == "DEFAULT":
        return False
    path = Path(weights)
    looks = path.suffix in (".safetensors", ".pth", ".pt", ".th", ".ckpt", ".bin", ".pkl", ".tar") or "/" in weights
    return looks or path.exists() or source.kind in ("factory", "file")


# --- architectures ----------------------------------------------------------------------------------------------


def _architecture(source: Source) -> nn.Module:
    """Run the source's builder without weights."""
    builder: Callable[[], Any] = {
        "torchvision": lambda: _torchvision(source),
        "timm": lambda: _timm().create_model(source.name, pretrained=False, **source.args),
        "hf": lambda: _transformers_from_config(source),
        "factory": lambda: _factory(source)(**source.args),
        "file": lambda: _factory(source)(**source.args),
    }[source.kind]
    try:
        model = builder()
    except SourceError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        if "meta" in str(error):
            raise
        raise _build_error(source, error) from error
    except (Exception, SystemExit) as error:  # a stranger's code raises whatever it likes
        raise _build_error(source, error) from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{source} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _build_error(source: Source, error: BaseException) -> SourceError:
    return SourceError(
        f"{source} cannot be built ({type(error).__name__}: {first_line(error)})",
        hint="Arguments of its builder are given as --arg key=value.",
    )


def _resolved(source: Source) -> Source:
    """With what is needed to rebuild it without a hub."""
    if source.kind == "hf" and source.config is None:
        return _hf_config(source)
    if source.kind == "timm":
        _check_timm_name(source.name)
    return source


def _torchvision_names() -> list[str]:
    from torchvision.models import list_models

    return list_models()


def _unknown_name(text: str) -> NoReturn:
    near = difflib.get_close_matches(text, _torchvision_names(), n=3, cutoff=0.6)
    ways = [f"Did you mean {' or '.join(near)}?"] if near else []
    if Path(text).suffix in (".pth", ".pt", ".th", ".ckpt", ".bin"):
        ways = [f"A checkpoint needs its architecture: normswap convert SOURCE --weights {text}"]
    elif Path(text).suffix == ".safetensors":
        ways = ["There is no such file."]
    ways.append("A source is a torchvision name, timm:NAME, hf:ID, package.module:factory, file.py:factory, or a file")
    raise SourceError(f"unknown model {text!r}", hint="\n".join(ways) + " normswap wrote.")


def _torchvision(source: Source) -> nn.Module:
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
    arguments["weights"] = _torchvision_weights(source.name, source.variant)
    arguments.pop("init_weights", None)
    with _published_state(_Withheld()):
        return builder(**arguments)


def _stop_hub_retries() -> None:
    """Tell huggingface_hub that it is offline when it is: it would retry for a minute, with a warning each time."""
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
            vars(constants)["HF_HUB_OFFLINE"] = True


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise SourceError("timm is not installed", hint='pip install "normswap[timm]"') from error


def _check_timm_name(name: str) -> None:
    timm = _timm()
    if timm.is_model(name.partition(".")[0]):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.6)
    raise SourceError(f"timm has no model {name!r}", hint=f"Did you mean {' or '.join(near)}?" if near else None)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise SourceError("transformers is not installed", hint='pip install "normswap[transformers]"') from error


def _hf_config(source: Source) -> Source:
    _stop_hub_retries()
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(source.name)
    except Exception as error:  # hub, network and file errors of several libraries
        raise _hub_error(source, error) from error
    architecture = (config.architectures or ["AutoModel"])[0]
    return Source("hf", source.name, source.args, source.variant, {"class": architecture, **config.to_dict()})


def _transformers_from_config(source: Source) -> nn.Module:
    transformers = _transformers()
    source = _resolved(source)
    values = {**(source.config or {}), **source.args}
    name = values.pop("class")
    if "use_pretrained_backbone" in values:
        values["use_pretrained_backbone"] = False
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    if name == "AutoModel":
        return transformers.AutoModel.from_config(config)
    return getattr(transformers, name)(config)


def _factory(source: Source) -> Callable[..., Any]:
    place, _, name = source.name.rpartition(":")
    module = _module_from_file(place) if source.kind == "file" else _module(place)
    factory: Any = module
    for part in name.split("."):
        factory = getattr(factory, part, None)
    if factory is None:
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(name, public, n=3, cutoff=0.5)
        raise SourceError(f"{place} has no {name!r}", hint=f"Did you mean {' or '.join(near)}?" if near else None)
    if not callable(factory):
        raise SourceError(f"{source} is {type(factory).__name__}, not a function or class that makes a model")
    return factory


def _module(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SourceError(f"module {name!r} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:  # code of the user's module
        raise SourceError(f"importing {name!r} failed ({type(error).__name__}: {first_line(error)})") from error


def _module_from_file(place: str) -> Any:
    path = Path(place)
    if not path.is_file():
        raise SourceError(f"{place} does not exist" if not path.exists() else f"{place} is not a file")
    name = f"normswap_source_{path.stem}_{abs(hash(str(path.resolve())))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{place} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))  # a script may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # code of the user's file
        del sys.modules[name]
        raise SourceError(f"running {place} failed ({type(error).__name__}: {first_line(error)})") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


# --- published weights ------------------------------------------------------------------------------------------


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
        return load(self, values, *args, **{**kwargs, "assign": True})

    WeightsEnum.get_state_dict = lambda *args, **kwargs: state
    module.load_state_dict = load_state_dict
    try:
        yield
    finally:
        WeightsEnum.get_state_dict = get
        module.load_state_dict = load


def _torchvision_weights(name: str, weights: str) -> Any:
    from torchvision.models import get_model_weights

    try:
        members = get_model_weights(name)
        return members.DEFAULT if weights == "DEFAULT" else members[weights]
    except (KeyError, AttributeError, ValueError):
        known = [w.name for w in get_model_weights(name)]
    near = difflib.get_close_matches(weights, known, n=1, cutoff=0.4)
    raise WeightsError(
        f"{name} has no weights named {weights!r}; it has {', '.join(known) or 'none'}",
        hint=f"Did you mean {near[0]}?" if near else "--weights none builds it with random weights.",
    )


def _pretrained_torchvision(source: Source, weights: str, progress: bool) -> tuple[nn.Module, Source]:
    from torchvision.models import get_model_builder

    chosen = _torchvision_weights(source.name, weights)
    state = _downloaded(chosen.url, source, progress)
    source = Source(source.kind, source.name, source.args, chosen.name)
    try:
        with empty_parameters(), _published_state(state):
            model = get_model_builder(source.name)(weights=chosen, **source.args)
    except Exception as error:  # a builder given arguments that do not go with the weights
        raise _build_error(source, error) from error
    return model, source


def _downloaded(url: str, source: Source, progress: bool) -> State:
    """The checkpoint from torch's hub folder, downloaded into it if need be."""
    file_name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if not path.exists():
        mirror = os.environ.get(MIRROR)
        origin = f"{mirror.rstrip('/')}/{file_name}" if mirror else url
        path.parent.mkdir(parents=True, exist_ok=True)
        expected = file_name.rpartition("-")[2].partition(".")[0] if "-" in file_name else None
        try:
            torch.hub.download_url_to_file(origin, str(path), expected, progress=progress)
        except (OSError, RuntimeError) as error:
            raise _offline(source, f"{origin} into {path}", error) from error
    return read_state(path)


def _offline(source: Source, tried: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"the weights of {source} cannot be downloaded: {tried} ({first_line(error)})",
        hint="Ways out: --weights FILE with a checkpoint you have, or --weights none for random weights.",
    )


def _hub_error(source: Source, error: Exception) -> WeightsError:
    return _offline(source, f"{source.name!r} from the Hugging Face hub", error)


def _pretrained_timm(source: Source, weights: str, progress: bool) -> tuple[nn.Module, Source]:
    timm = _timm()
    _check_timm_name(source.name)
    name = source.name if weights == "DEFAULT" else f"{source.name.partition('.')[0]}.{weights}"
    if weights != "DEFAULT" and weights not in (tags := _timm_tags(name)):
        raise WeightsError(f"timm's {source.name} has no weights named {weights!r}; it has {', '.join(tags) or 'none'}")
    source = Source("timm", name, source.args)
    _stop_hub_retries()
    try:
        return timm.create_model(name, pretrained=True, **source.args), source
    except Exception as error:  # hub, network and file errors of several libraries
        raise _offline(source, "its pretrained weights from the Hugging Face hub", error) from error


def _timm_tags(name: str) -> list[str]:
    base = name.partition(".")[0]
    return [n.partition(".")[2] for n in _timm().list_pretrained(f"{base}.*")]


def _pretrained_hf(source: Source, weights: str, progress: bool) -> tuple[nn.Module, Source]:
    transformers = _transformers()
    if weights != "DEFAULT":
        raise WeightsError(f"hf: models take --weights DEFAULT, none or FILE, got {weights!r}")
    source = _resolved(source)
    cls = getattr(transformers, (source.config or {})["class"])
    try:
        return cls.from_pretrained(source.name, **source.args), source
    except Exception as error:  # hub, network and file errors of several libraries
        raise _hub_error(source, error) from error


def _pretrained_factory(source: Source, weights: str, progress: bool) -> tuple[nn.Module, Source]:
    return _architecture(source), source


_PRETRAINED: dict[str, Callable[[Source, str, bool], tuple[nn.Module, Source]]] = {
    "torchvision": _pretrained_torchvision,
    "timm": _pretrained_timm,
    "hf": _pretrained_hf,
    "factory": _pretrained_factory,
    "file": _pretrained_factory,
}
