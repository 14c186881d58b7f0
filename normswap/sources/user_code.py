"""The user's own architectures: `package.module:factory` and `path/to/file.py:factory`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import Fix, SourceError, Text, did_you_mean, first_line
from .spec import FORMS, Source, near_file

_FILE = "normswap_source_"  # and what is the same in any process: classes are pickled under the module's name


def architecture(source: Source) -> Any:
    """Run the factory. What it returns is whatever its author wrote; the caller checks it."""
    return _factory(source)(**source.args)


def beside(source: Source, file: Path) -> Source:
    """Where the code of a converted file is: as the file says, from the current folder; else beside the file itself.

    A module there becomes importable. Raises SourceError for a Python file that is in neither place.
    """
    place, _, name = source.name.rpartition(":")
    if source.kind == "factory":
        top = place.partition(".")[0]
        here = any((Path(top + end)).exists() for end in ("", ".py"))
        if not here and importlib.util.find_spec(top) is None and str(file.parent.resolve()) not in sys.path:
            sys.path.append(str(file.parent.resolve()))
    if source.kind != "file" or Path(place).is_file():
        return source
    for found in (file.parent / place, file.parent / Path(place).name):
        if found.is_file():
            return replace(source, name=f"{found}:{name}")
    raise SourceError(
        f"{file} is built by {source}, and {place} is neither in the current folder nor beside the file",
        hint=Text(Fix("source"), f" says where it is: FOLDER/{Path(place).name}:{name}"),
    )


def files_in(pickled: bytes) -> list[str]:
    """The Python files of those whose classes are in a pickle, for `run_again` in another process."""
    return [
        str(Path(module.__file__).resolve())
        for name, module in list(sys.modules.items())
        if name.startswith(_FILE) and module.__file__ and name.encode() in pickled
    ]


def run_again(files: Iterable[str]) -> None:
    """Let what is of these files be unpickled. Raises SourceError."""
    for file in files:
        _module_from_file(file)


@contextmanager
def importable(source: Source) -> Iterator[None]:
    """Within it, a source's file, and those beside it, can be imported by name, as pickled networks of theirs need.

    What can be imported already, or was, stays what it is. Raises SourceError for code that fails.
    """
    place = source.name.rpartition(":")[0]
    if source.kind == "factory":
        _module(place)
    if source.kind != "file":
        yield
        return
    module, name, folder = _module_from_file(place), Path(place).stem, str(Path(place).resolve().parent)
    new = name.isidentifier() and name not in sys.modules and importlib.util.find_spec(name) is None
    if new:
        sys.modules[name] = module
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)
        if new:
            sys.modules.pop(name, None)


def _factory(source: Source) -> Callable[..., Any]:
    place, _, name = source.name.rpartition(":")
    module = _module_from_file(place) if source.kind == "file" else _module(place)
    factory: Any = module
    for part in name.split("."):
        factory = getattr(factory, part, None)
    if factory is None:
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise SourceError(f"{place} has no {name!r}", hint=did_you_mean(name, public))
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
        if path.exists():
            raise SourceError(f"{place} is not a file")
        raise SourceError(f"{place} does not exist", hint=near_file(path) or FORMS)
    name = f"{_FILE}{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{place} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    complete = False
    sys.path.insert(0, str(path.resolve().parent))  # a script may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # code of the user's file
        raise SourceError(f"running {place} failed ({type(error).__name__}: {first_line(error)})") from error
    else:
        complete = True
    finally:
        if not complete:
            sys.modules.pop(name, None)
        with suppress(ValueError):  # the script removed it itself
            sys.path.remove(str(path.resolve().parent))
    return module
