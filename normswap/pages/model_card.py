"""A converted file -> a folder for the Hugging Face hub: the file, a model card, a script that loads it."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.manifest import read_manifest
from ..display.overview import Cell, Table, kept_table, steps_table
from ..display.printable import printable
from ..errors import CheckpointError, Fix, OutputError, SourceError, Text, first_line, plural
from ..evaluation.report import FIGURES
from ..files.writing import atomic
from ..planning.plan import Plan
from ..sources.spec import Source
from ..sources.user_code import beside
from .content import content_of, undo_command

MODEL, CARD, SCRIPT = "model.safetensors", "README.md", "load.py"
_TAGS = {"gn": "group-norm", "ln": "layer-norm", "in": "instance-norm", "frozen": "frozen-batch-norm"}
_PIPELINES = {"classification": "image-classification", "detection": "object-detection",
              "segmentation": "image-segmentation"}  # fmt: skip
_OF_A_RUN = ("best", "last", "model")


@dataclass(frozen=True)
class Evaluation:
    """What `normswap evaluate -o FILE.json` has written. figures: by the names in `FIGURES`; source: of the network."""

    task: str
    data: str
    images: int
    figures: Mapping[str, float]
    source: Source | None = None

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Raises CheckpointError for anything else."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if "cells" in values:
                raise ValueError("it is of normswap compare, and of several networks")
            figures = {name: float(value) for name, value in values["figures"].items() if name in FIGURES}
            if values["task"] in _PIPELINES and figures:
                source = (values.get("network") or {}).get("source")
                named = None if source is None else Source.from_dict(source)
                return cls(values["task"], str(values["data"]), int(values["images"]), figures, named)
            raise ValueError("none of its figures is known")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not what normswap evaluate writes ({first_line(error)})",
                hint="normswap evaluate FILE --data FOLDER -o evaluation.json writes what is shown.",
            ) from error


@dataclass(frozen=True)
class HubFolder:
    """What was written. code: files of the user's own that build the network, copied beside it."""

    folder: Path
    files: tuple[Path, ...]
    code: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"folder": str(self.folder), "files": [f.name for f in self.files], "code": [f.name for f in self.code]}


def write_hub_folder(
    file: Path,
    folder: Path,
    *,
    license: str | None = None,
    evaluation: Evaluation | None = None,
    overwrite: bool = False,
) -> HubFolder:
    """Write the folder. Raises CheckpointError for a file that normswap did not write, OutputError for a bad place."""
    manifest = read_manifest(file)
    if not file.is_file() or file.suffix == ".json":
        raise CheckpointError(
            f"{file} is in shards, and a card goes with one file",
            hint=f'In Python: normswap.save(normswap.load("{file}"), "model.safetensors")',
        )
    _check_same(file, manifest, evaluation)
    card, code = card_text(file, manifest, license, evaluation), _code(file, manifest)
    with _new_folder(folder, overwrite=overwrite, file=file):
        _write(folder / SCRIPT, _script(manifest))
        for path in (file, *code):
            with atomic(folder / (MODEL if path == file else path.name)) as temporary:
                shutil.copyfile(path, temporary)
        _write(folder / CARD, card)
    names = (MODEL, CARD, SCRIPT)
    return HubFolder(folder, tuple(folder / name for name in names), tuple(folder / path.name for path in code))


def _check_same(file: Path, manifest: Mapping[str, Any], evaluation: Evaluation | None) -> None:
    """Figures of one network are not to be published as those of another."""
    if evaluation is None or evaluation.source is None or manifest["source"] is None:
        return
    source = Source.from_dict(manifest["source"])
    if (source.kind, source.name) != (evaluation.source.kind, evaluation.source.name):
        raise CheckpointError(
            f"the evaluation is of {evaluation.source}, and {file} is made of {source}",
            hint="normswap evaluate FILE --data FOLDER -o FILE.json",
        )


def card_text(
    file: Path, manifest: Mapping[str, Any], license: str | None = None, evaluation: Evaluation | None = None
) -> str:
    """Markdown with the front matter that the hub reads; what is not known is left out of it.

    See https://huggingface.co/docs/hub/model-cards.
    """
    plan = Plan.from_dict(manifest["plan"])
    content = content_of({"network": {"file": str(file)}})
    source = None if manifest["source"] is None else Source.from_dict(manifest["source"])
    parts = [
        _front_matter(plan, source, license, evaluation),
        f"# {_text(_title(file, plan, source))}\n\n{_summary(plan, source)}",
        *_usage(manifest, source),
    ]
    if evaluation is not None:
        rows = tuple((FIGURES[name], f"{value:.4f}") for name, value in evaluation.figures.items())
        on = f"On {plural(evaluation.images, 'image')} of {_code_span(Path(evaluation.data).name or evaluation.data)}:"
        parts.append(f"## Figures\n\n{on}\n\n{_markdown(Table(('figure', '>value'), rows))}")
    parts.append(f"## What changed\n\n{_markdown(steps_table(plan.steps))}")
    if plan.kept:
        parts.append(f"### Kept\n\n{_markdown(kept_table(plan.kept))}")
    if content.check is not None and content.check["error"] is not None:
        told = "with every new norm reduced to its scale and shift, the" if content.reduced else "the converted"
        if content.history:  # what was done since has led away from it, a new head first of all
            told = f"Right after the conversion, {told} network equalled the original"
        else:
            told = f"{told[0].upper()}{told[1:]} network equals the original"
        parts.append(
            f"{told} to a relative error "
            f"of {content.check['error']} ({content.check['layers']} of {content.check['total']} layers)."
        )
    if content.history:
        parts.append("## Since the conversion\n\n" + "\n".join(f"1. {_text(entry)}" for entry in content.history))
    if (undo := undo_command(Path(MODEL), manifest, content.trained)) is not None:
        parts.append(f"## Undoing it\n\n```console\n$ {printable(undo)}\n```")
    versions = ", ".join(f"{_text(name)} {_text(version)}" for name, version in content.versions.items())
    parts.append(f"Written with {versions}. `{MODEL}` holds the plan, layer by layer, in its metadata.")
    return printable("\n\n".join(parts) + "\n")


def _title(file: Path, plan: Plan, source: Source | None) -> str:
    """The file's name; where that is one of those that a run writes, the network's, or else the folder's."""
    if file.stem not in _OF_A_RUN:
        return file.stem
    targets = list(dict.fromkeys(step.target for step in plan.steps))
    swap = "" if not targets else "-mixed" if len(targets) > 1 else f"-{targets[0]}"
    return f"{source.stem}{swap}" if source is not None else file.resolve().parent.name or file.stem


def _front_matter(plan: Plan, source: Source | None, license: str | None, evaluation: Evaluation | None) -> str:
    targets = dict.fromkeys(step.target for step in plan.steps)
    values: dict[str, Any] = {
        "library_name": "normswap",
        "license": license,
        "base_model": _base_model(source),
        "pipeline_tag": _pipeline(source, evaluation),
        "tags": ["normswap", "pytorch", *(_TAGS[name] for name in targets if name in _TAGS)],
    }
    # JSON is YAML, and its quotes let no value end early.
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items() if value]
    return "\n".join(["---", *lines, "---"])


def _base_model(source: Source | None) -> str | None:
    """The hub's name for the network that this one was made of; None where it has none, or other weights."""
    weights = (source.weights if source is not None else None) or {}
    given = weights.get("given")
    if source is None or weights.get("random") or (given is not None and Path(given).suffix):
        return None
    if source.kind == "timm" and "." in source.name:
        return f"timm/{source.name}"
    published = source.kind == "hf" and source.name.count("/") <= 1 and not Path(source.name).exists()
    return source.name if published else None


def _pipeline(source: Source | None, evaluation: Evaluation | None) -> str | None:
    if evaluation is not None:
        return _PIPELINES[evaluation.task]
    if source is None or source.kind == "timm":
        return None if source is None else _PIPELINES["classification"]
    if source.kind != "torchvision":
        return None
    from torchvision import models

    for task in ("detection", "segmentation"):
        if source.name in models.list_models(module=getattr(models, task)):
            return _PIPELINES[task]
    return _PIPELINES["classification"] if source.name in models.list_models(module=models) else None


def _summary(plan: Plan, source: Source | None) -> str:
    counts: dict[tuple[str, str], int] = {}
    for step in plan.steps:
        counts[step.source, step.target] = counts.get((step.source, step.target), 0) + 1
    changes = ", ".join(f"{count} {was} to {becomes}" for (was, becomes), count in counts.items())
    weights = ((source.weights if source is not None else None) or {}).get("name")
    name = "A network" if source is None else _code_span(_without_folders(source))
    with_weights = f" ({_text(Path(weights).name)})" if weights else ""
    return f"{name}{with_weights} with its normalization layers converted by normswap: {_text(changes)}."


def _without_folders(source: Source) -> str:
    """As SOURCE has it, but of a file or folder the name alone: where it lay is nobody's business."""
    name = str(source)
    if source.kind == "file" or (source.kind == "hf" and (source.name.count("/") > 1 or Path(source.name).exists())):
        return name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return name


def _usage(manifest: Mapping[str, Any], source: Source | None) -> Iterator[str]:
    code = source is not None and source.runs_code
    trust = ", trust_code=True" if code else ""
    yield (
        "## Use\n\n```python\nfrom pathlib import Path\n\n"
        "import normswap\nfrom huggingface_hub import snapshot_download\n\n"
        f'model = normswap.load(Path(snapshot_download("USER/NAME"), "{MODEL}"){trust})\n```'
    )
    if code:
        yield "Its architecture is built by code that comes with it; read it first."
    elif source is None:
        yield 'Its architecture has to be built first: `normswap.load("model.safetensors", model=...)`.'
    inputs = manifest.get("inputs") or {}
    if "mean" in inputs:
        mean, std = (" ".join(f"{value:g}" for value in inputs[name]) for name in ("mean", "std"))
        shape = "x".join(map(str, inputs["shape"])) if "shape" in inputs else ""
        yield f"Inputs{' of ' * bool(shape)}{shape}: pixels from 0 to 1, normalised with mean {mean}, std {std}."


def _script(manifest: Mapping[str, Any]) -> str:
    source = manifest["source"]
    trust = ", trust_code=True" if source is not None and Source.from_dict(source).runs_code else ""
    return (
        '"""Load the network: pip install normswap."""\n\nfrom pathlib import Path\n\nimport normswap\n\n'
        f'model = normswap.load(Path(__file__).with_name("{MODEL}"){trust})\nprint(model)\n'
    )


def _code(file: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """The Python file that builds the network, where it is one, from where `load` would take it."""
    if manifest["source"] is None or manifest["source"]["kind"] != "file":
        return []
    try:
        found = beside(Source.from_dict(manifest["source"]), file)
    except SourceError:  # it is nowhere to be found; whoever loads the file is told where to put it
        return []
    return [Path(found.name.rpartition(":")[0])]


@contextmanager
def _new_folder(folder: Path, *, overwrite: bool, file: Path) -> Iterator[None]:
    """Within it, the folder is there; if something fails, one that was not there before goes again."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file", hint=Text(Fix("output"), " names a folder."))
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        way = Text(Fix("overwrite", True), " writes over what is in it; ", Fix("output"), " names another folder.")
        raise OutputError(f"{folder} is not empty", hint=way)
    if (folder / MODEL).exists() and (folder / MODEL).samefile(file):
        raise OutputError(f"{folder} holds the file itself", hint=Text(Fix("output"), " names another folder."))
    made = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror or error}") from error
    try:
        yield
    except BaseException:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _markdown(table: Table) -> str:
    head = "| " + " | ".join(title.lstrip(">") for title in table.columns) + " |"
    rule = "|" + "|".join("---:" if title.startswith(">") else "---" for title in table.columns) + "|"
    return "\n".join([head, rule, *(_row(row) for row in table.rows)])


def _row(cells: Sequence[Cell]) -> str:
    texts = (_code_span(cell[0]) if cell[1:] == ("path",) else _text(cell) for cell in cells)
    return "| " + " | ".join(texts) + " |"


def _text(cell: Cell) -> str:
    """As Markdown shows it: no markup, no HTML, no end of a table's cell, no new line."""
    text = " ".join(printable(cell if isinstance(cell, str) else cell[0]).split())
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(text, quote=False))


def _code_span(text: str) -> str:
    """Between backticks, where it has none; names of layers hardly ever do."""
    plain = " ".join(printable(text).split())
    return _text(text) if "`" in plain or "|" in plain else f"`{plain}`"
