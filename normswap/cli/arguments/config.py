"""Options of a command from a file, YAML, TOML or the run.json of an earlier run, and back into YAML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from ...errors import NormswapError, OptionError, did_you_mean, first_line
from ..terminal.help import PANELS, Command
from . import options

CONFIG, PRINT = "config", "print_config"
NOT_OF_A_RUN = frozenset({"json", "quiet", "verbose", "force", "resume", "report", CONFIG, PRINT})
"""Parameters that say how a command reports, and whether it replaces or resumes a run: not what the run is."""
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
_HELP_AT = 34  # the column of the comments


def _read(ctx: typer.Context, param: typer.CallbackParam, path: Path | None) -> Path | None:
    """The callback of --config: what the file says stands in for what the command line leaves out."""
    if path is not None and not ctx.resilient_parsing:
        ctx.default_map = {**(ctx.default_map or {}), **_checked(ctx, path, _settings(path))}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        callback=_read,
        is_eager=True,
        help="Take options from this YAML or TOML file, or from the run.json of an earlier run; those given here win.",
        show_default=False,
    ),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print all options as they stand, as YAML for --config, and exit.")
]


class Configured(Command):
    """A command that takes --config. exclusive: options of which one given to the command drops the file's other."""

    exclusive: tuple[tuple[str, str], ...] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options; with --print-config, print them and leave."""
        printing = "--print-config" in args
        with self._nothing_required(printing):
            rest = super().parse_args(ctx, args)
        for pair in self.exclusive:
            for one, other in (pair, pair[::-1]):
                if _source(ctx, one) == "COMMANDLINE" and _source(ctx, other) == "DEFAULT_MAP":
                    flag = getattr(next(p for p in self.params if p.name == other), "is_flag", False)
                    ctx.params[other] = False if flag else None
        if printing and not ctx.resilient_parsing:
            typer.echo(written(self, ctx.params))
            raise typer.Exit
        return rest

    @contextmanager
    def _nothing_required(self, wanted: bool) -> Iterator[None]:
        loose = [p for p in self.params if p.required and wanted]
        for param in loose:
            param.required = False
        try:
            yield
        finally:
            for param in loose:
                param.required = True


def _source(ctx: Any, name: str) -> str:
    found = ctx.get_parameter_source(name)
    return "" if found is None else str(found.name)


# --- reading ------------------------------------------------------------------------------------------------------


def _settings(path: Path) -> dict[str, Any]:
    """What the file says, by key. Raises OptionError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OptionError(f"{path}, which --config names, does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from error
    found = _parsed(path, text)
    if isinstance(found, dict) and isinstance(found.get("options"), dict) and path.suffix.lower() == ".json":
        found = found["options"]  # of a run.json, whose other parts say the same in other words
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise OptionError(f"{path} holds no options", hint="Write one a line, as `batch_size: 2`; --print-config does.")
    return found


def _parsed(path: Path, text: str) -> Any:
    """The content of a file by the ending of its name."""
    kind = path.suffix.lower()
    try:
        if kind == ".json":
            return json.loads(text)
        if kind == ".toml":
            return _toml().loads(text)
        if kind in (".yaml", ".yml"):
            return _yaml().safe_load(text)
    except NormswapError:
        raise
    except Exception as error:  # each of the three has errors of its own
        where = getattr(error, "problem_mark", None)
        said = str(error) if where is None else f"{getattr(error, 'problem', '')}, line {where.line + 1}"
        raise OptionError(f"{path} is no valid {kind[1:].upper()}: {' '.join(said.split())[:200]}") from error
    raise OptionError(f"{path} is neither YAML nor TOML by its name", hint="Name it FILE.yaml or FILE.toml.")


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise NormswapError("a YAML file needs PyYAML", hint="pip install 'normswap[train]'") from error
    return yaml


def _toml() -> Any:
    try:
        import tomllib  # type: ignore[import-not-found,unused-ignore]
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[import-not-found,no-redef,unused-ignore]
        except ImportError as error:
            hint = "pip install 'normswap[train]'"
            raise NormswapError("a TOML file needs tomli before Python 3.11", hint=hint) from error
    return tomllib


def _checked(ctx: typer.Context, path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by parameter, each as the command line would give it. Raises OptionError in one sentence."""
    command: Any = ctx.command
    keys = _keys(command)
    hints = get_type_hints(command.callback)
    found: dict[str, Any] = {}
    for key, value in settings.items():
        param = keys.get(command._today("--" + key.replace("_", "-"))[2:].replace("-", "_"))
        if param is None:
            hint = did_you_mean(key.replace("-", "_"), keys) or "--print-config prints all that there are."
            raise OptionError(f"{path}: {key} is no option of normswap {command.name}", hint=hint)
        if param.name in found:
            raise OptionError(f"{path}: {key} is given twice, under two names")
        if value is None:
            continue  # as if it were not there
        found[param.name] = given = _value(path, key, value, hints[param.name])
        try:
            param.process_value(ctx, given)
        except options.UsageError as error:
            raise OptionError(f"{path}: {key}: {error.message}") from error
    return found


def _keys(command: Any) -> dict[str, Any]:
    """Parameters by the names that a file may give them: the flag, or what run.json calls them."""
    params = [p for p in command.params if p.name not in (CONFIG, PRINT, "help")]
    flags = {flag[2:].replace("-", "_"): p for p in params for flag in p.opts if flag.startswith("--")}
    return flags | {p.name: p for p in params}


def _value(path: Path, key: str, value: Any, hint: Any) -> Any:
    """A value of the file as click takes it. hint: the type of the parameter, such as `int | None`."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if kinds[0] not in _KINDS:  # list[str], of an option that is repeatable
        if isinstance(value, Mapping):
            return [f"{name}={_text(each)}" for name, each in value.items()]
        return [_text(each) for each in value] if isinstance(value, list) else [_text(value)]
    kind = kinds[0]
    if kind is str and isinstance(value, list) and value and all(_is_number(each) for each in value):
        return ",".join(map(str, value))  # sizes, means
    if kind is bool:
        fits = isinstance(value, bool)
    elif kind in (int, float):
        fits = _reads(kind, value)
    else:
        fits = isinstance(value, str) or (kind is str and _is_number(value))
    if not fits:
        raise OptionError(f"{path}: {key} must be {_KINDS[kind]}, got {_text(value)}")
    return value if kind is bool else str(value)


def _reads(kind: type, value: Any) -> bool:
    """Whether that is such a number, or a text that says one: in YAML 1e-3, without a point, is a text."""
    if isinstance(value, str):
        try:
            kind(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


# --- writing ------------------------------------------------------------------------------------------------------


def written(command: Any, values: Mapping[str, Any]) -> str:
    """All options with these values, by parameter, as YAML with what each means."""
    said = {"report"} if values.get("report") else set()  # which a file may ask for, too
    by_name = {p.name: p for p in command.params if p.name not in NOT_OF_A_RUN - said}
    lines = [f"# normswap {command.name} --config FILE; null is what normswap chooses itself"]
    lines += [_line("source", values.get("source"), "The network.")] if "source" in by_name else []
    for title, names in PANELS.items():
        shown = [by_name[name] for name in names.split() if name in by_name and name != "source"]
        lines += [f"\n# {title}"] if shown else []
        lines += [_line(param.name, values.get(param.name), _meaning(param)) for param in shown]
    return "\n".join(lines)


def _meaning(param: Any) -> str:
    said = param.help or ""
    usual = getattr(param, "show_default", None)
    return f"{said} [null: {usual}]" if isinstance(usual, str) else said


def _line(name: str, value: Any, meaning: str) -> str:
    if isinstance(value, Path):
        value = str(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        value = list(value)
    text = _yaml().safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).split("\n...")[0].strip()
    return f"{f'{name}: {text}':<{_HELP_AT}}  # {meaning}"
