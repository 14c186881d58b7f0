"""Names of networks for the shell to complete: read from the libraries' files, since importing them takes seconds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

_REGISTERED = re.compile(r"^@register_model\b.*?^def (\w+)", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"^@register_model\(name=\"(\w+)\"", re.MULTILINE)
_TIMM = "timm:"


def model_names(incomplete: str) -> list[str]:
    """Converted files and scripts of this folder, torchvision's networks, and, after `timm:`, timm's."""
    if incomplete.startswith(_TIMM):
        return [_TIMM + name for name in _of("timm") if name.startswith(incomplete[len(_TIMM) :])]
    here = [str(path) for pattern in ("*.safetensors", "*.py") for path in sorted(Path().glob(pattern))]
    here = [f"{name}:" if name.endswith(".py") else name for name in here]
    prefixes = [_TIMM, "hf:"]
    return [name for name in (*here, *_of("torchvision"), *prefixes) if name.startswith(incomplete)]


def converted_files(incomplete: str) -> list[str]:
    """Converted files of this folder."""
    return [str(path) for path in sorted(Path().glob("*.safetensors")) if str(path).startswith(incomplete)]


def _of(library: str) -> list[str]:
    """The names that a library registers its networks under."""
    return sorted({name for file in _files(library) for name in _names(file.read_text("utf-8", errors="replace"))})


def _files(library: str) -> Iterator[Path]:
    spec = find_spec(library)  # of a top-level package: nothing is imported
    for folder in (spec and spec.submodule_search_locations) or ():
        yield from sorted(Path(folder, "models").rglob("*.py"))


def _names(source: str) -> list[str]:
    named = _NAMED.findall(source)
    return [*named, *(name for name in _REGISTERED.findall(source) if f"quantized_{name}" not in named)]
