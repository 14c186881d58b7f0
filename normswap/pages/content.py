"""What a command printed with --json -> what its page shows. Nothing else is gathered, but for the file's manifest."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..checkpoint.manifest import read_manifest
from ..conversion.history import Entry
from ..errors import CheckpointError, plural
from ..evaluation.report import FIGURES
from ..finetuning.output.by_class import COUNTED, OF_CLASSES
from ..finetuning.output.layout import METRICS
from ..finetuning.output.metrics_log import read_lines
from ..planning.plan import Plan, Transfer
from ..sources.spec import Source
from .charts import Mark, Series, line_chart, matrix_chart
from .comparison import comparison_charts, comparison_table
from .layer_tree import Node, layer_tree
from .parts import Chart, number

_MATRIX = 30  # classes up to which the confusion matrix is drawn
_WORST = 20
_NAMES = {"drift": "output, relative error", "agreement": "agreement with the original", "eval_loss": "loss"}


@dataclass(frozen=True)
class Content:
    """All that the page shows; what is empty is left out of it. networks, facts: (label, text)."""

    networks: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    figures: tuple[list[str], list[list[str]]]
    tree: Node | None
    rules: list[str]
    check: Mapping[str, Any] | None
    reduced: bool
    charts: list[Chart]
    risks: list[str]
    notes: list[str]
    bad: list[str]
    file: str | None
    history: list[str]
    undo: str | None
    next: str | None
    trained: bool
    versions: Mapping[str, str]
    manifest: Mapping[str, Any] | None = field(repr=False, default=None)


def content_of(values: Mapping[str, Any]) -> Content:
    """values: the command's --json."""
    file = _file(values)
    manifest = _manifest(file)
    plan = values.get("plan") or (manifest or {}).get("plan")
    history = (manifest or {}).get("history", ())
    trained = any(Entry.from_dict(entry).trains for entry in history)
    report = values.get("calibration") or values
    return Content(
        networks=_networks(values),
        facts=_facts(values),
        figures=_figures(report),
        tree=layer_tree(Plan.from_dict(plan)) if plan and plan["steps"] else None,
        rules=[
            f"{rule['pattern']} matched {plural(rule['layers'], 'layer')}: {rule['target']}"
            for rule in ((plan or {}).get("meta") or {}).get("rules", ())
        ],
        check=_check(values, manifest),
        reduced=any(Transfer(step["transfer"]).standardizes for step in (plan or {}).get("steps", ())),
        charts=[chart for chart in _charts(values, report) if chart.svg or chart.rows],
        risks=[_risk(risk) for risk in values.get("risks", ())],
        notes=[
            *filter(None, [values.get("problem")]),
            *report.get("notes", ()),
            *(values.get("notes", ()) if report is not values else ()),
        ],
        bad=list(report.get("bad", ())),
        file=None if manifest is None else str(file),
        history=[_told(entry) for entry in history],
        undo=None if manifest is None or values.get("undone") else undo_command(file, manifest, trained),
        next=values.get("command"),
        trained=trained,
        versions=(manifest or {}).get("versions", {}),
        manifest=manifest,
    )


def _file(values: Mapping[str, Any]) -> Path | None:
    """The file that normswap wrote, or read where it wrote none."""
    networks = [values.get(name) or {} for name in ("b", "network", "a")]
    found = [values.get("best_file"), values.get("output"), *(network.get("file") for network in networks)]
    return next((Path(place) for place in found if place and str(place).endswith(".safetensors")), None)


def _manifest(file: Path | None) -> dict[str, Any] | None:
    try:
        return None if file is None else read_manifest(file)
    except CheckpointError:  # a plain state dict, of a conversion that was undone
        return None


def undo_command(file: Path | None, manifest: Mapping[str, Any], trained: bool) -> str | None:
    """The command that undoes the conversion; None where the file does not hold what that takes."""
    kept = manifest["undo"]
    if not kept or not kept.get("complete", True) or not manifest["plan"]["steps"]:
        return None
    source = manifest["source"]
    code = source is not None and Source.from_dict(source).runs_code
    return f"{_UNDO[trained, code]} {shlex.quote(str(file))}"


_UNDO = {
    (False, False): "normswap convert --to original",
    (False, True): "normswap convert --to original --trust-code",
    (True, False): "normswap convert --to original --approximate",
    (True, True): "normswap convert --to original --approximate --trust-code",
}
"""By whether the network was trained since, and whether code that is in no library builds it."""


def _networks(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {"network": "network", "reference": "original", "a": "A", "b": "B"}
    return [(told, _network(values[name])) for name, told in names.items() if values.get(name)]


def _network(values: Mapping[str, Any]) -> str:
    source, weights = values.get("source"), (values.get("weights") or {}).get("name")
    if values.get("file"):
        return str(values["file"])
    text = "" if source is None else f"{_PREFIX.get(source['kind'], '')}{source['name']}"
    return f"{text} ({weights})" if text and weights else text or str(weights)


_PREFIX = {"timm": "timm:", "hf": "hf:"}


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    report = values.get("calibration") or values
    found = [*values.get("facts", ()), ("data", values.get("data")), ("figures", values.get("rests_on"))]
    found += [("images", report.get("images")), ("stand-ins", report.get("stand_ins"))]
    if "planned" in values and "steps" in values:
        steps = f"{values['steps']} of {values['planned']}" + ", interrupted" * bool(values.get("interrupted"))
        found += [("steps", steps), ("learning rate", number(values.get("lr"))), ("batch", values.get("global_batch"))]
    if values.get("kept") is not None and values.get("kept") != values.get("steps"):
        found.append(("state kept", f"of step {values['kept']}"))
    found += [("written", values.get("output")), ("size", _size(values.get("bytes")))]
    if values.get("dry_run"):
        found.append(("dry run", "nothing was written"))
    if values.get("undone"):
        found.append(("undone", "approximately" if values.get("approximate") else "bit for bit"))
    return [(label, str(value)) for label, value in found if value not in (None, "")]


def _figures(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A table: column titles and rows."""
    if "cells" in report:
        return comparison_table(report)
    if isinstance(report.get("figures"), dict):
        return _of_run(report)
    if "accuracy_a" in report:
        pairs = [("accuracy", report["accuracy_a"], report["accuracy_b"])] if report["accuracy_a"] is not None else []
        between = {"agreement": "agreement", "error": "output, relative error", "kl": "KL(A, B), nats"}
        if report.get("random_inputs"):  # of no class, so that nothing is decided alike or not
            between = {"error": between["error"]}
        shared = [[text, "", "", number(report[name])] for name, text in between.items() if report[name] is not None]
        rows = [[name, number(a), number(b), ""] for name, a, b in pairs]
        return ["", "A", "B", "of both"], rows + shared
    rows = []
    if report.get("accuracy_after") is not None:
        rows.append(["accuracy", *(number(report[f"accuracy_{which}"]) for which in ("original", "before", "after"))])
    for name, text in _NAMES.items():
        if report.get(f"{name}_before") is not None:
            rows.append([text, "", number(report[f"{name}_before"]), number(report.get(f"{name}_after"))])
    return ["", "original", "before", "after"], rows


def _of_run(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    before = report.get("before")
    if before is None:
        return ["", ""], [[FIGURES.get(name, name), number(value)] for name, value in report["figures"].items()]
    rows = [[_words(name), number(before.get(name)), number(value)] for name, value in report["figures"].items()]
    if report.get("best") is not None:
        rows.append([f"best {_words(report['best_name'])}, step {report['best_at']}", "", number(report["best"])])
    return ["", "before", "after"], rows


def _words(name: str) -> str:
    kind = "validation" if name.startswith("val_") else "training"
    return f"{kind} {_named(name.removeprefix('val_'))}"


def _named(name: str) -> str:
    """`mask mAP50` of `mask_map_50`."""
    return re.sub(r"\bmap\b(?: (?=\d))?", "mAP", name.replace("_", " ")).replace("miou", "mIoU")


def _check(values: Mapping[str, Any], manifest: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The self-check of this conversion, or of the one that the file remembers."""
    if values.get("undone"):
        return None
    check = values.get("self_check") or (manifest or {}).get("check")
    return None if not check else {**check, "error": None if check["error"] is None else f"{check['error']:.1e}"}


def _charts(values: Mapping[str, Any], report: Mapping[str, Any]) -> Iterable[Chart]:
    if "cells" in values:
        yield from comparison_charts(values)
    if values.get("drift_by_groups"):
        yield _by_groups(values)
    layers = report.get("layers") or ()
    if not isinstance(layers, (list, tuple)):  # of advise, how many
        return
    if layers and "error" in layers[0]:
        yield _drift(layers, values.get("first_jump"))
    if layers and "error_before" in layers[0]:
        yield _moments(layers)
    if report.get("losses"):
        yield _losses(report)
    yield from _curves(values)
    if report.get("classes"):
        yield _classes(report)
    if report.get("confusion"):
        yield _confusion(report)


def _drift(layers: Sequence[Mapping[str, Any]], jump: str | None) -> Chart:
    finite = [(i + 1, layer) for i, layer in enumerate(layers) if isinstance(layer["error"], float)]
    names = [layer["path"] for _, layer in finite]
    series = Series("relative error", [(i, layer["error"]) for i, layer in finite], names=names)
    mark = next((Mark(i + 1, f"first jump: {x['path']}") for i, x in enumerate(layers) if x["path"] == jump), None)
    text = "The relative error of each layer's output, in the order in which the network runs them. "
    text += "No layer jumps." if jump is None else f"The networks part at {jump}."
    svg = line_chart([series], x="layer", y="relative error", log=True, mark=mark, dots=True)
    rows = [[layer["path"], number(layer["error"]), number(layer["max_abs"])] for layer in layers]
    return Chart("Drift of each layer", text, svg, ("layer", "relative error", "largest difference"), rows)


def _by_groups(values: Mapping[str, Any]) -> Chart:
    """Of GroupNorm, as advise expects it."""
    drifts = {int(groups): drift for groups, drift in values["drift_by_groups"].items()}
    labels = [(math.log2(groups), str(groups)) for groups in drifts]
    series = Series("drift", [(math.log2(groups), drift) for groups, drift in drifts.items()])
    svg = line_chart([series], x="groups", y="relative error of the output", dots=True, labels=labels)
    rows = [[str(groups), number(drift)] for groups, drift in drifts.items()]
    text = "Right after a swap to GroupNorm, before any repair, told from the weights alone."
    return Chart("Drift to expect, over the number of groups", text, svg, ("groups", "drift"), rows)


def _moments(layers: Sequence[Mapping[str, Any]]) -> Chart:
    names = [layer["path"] for layer in layers]
    series = [
        Series(when, [(i + 1, layer[f"error_{when}"]) for i, layer in enumerate(layers)], colour, names)
        for when, colour in (("before", 2), ("after", 1))
    ]
    text = "How far the mean and variance of each norm's output are from the original's, before its repair and after."
    svg = line_chart(series, x="layer", y="moment error", log=True, dots=True)
    rows = [[x["path"], number(x["error_before"]), number(x["error_after"])] for x in layers]
    return Chart("Moments of each layer", text, svg, ("layer", "before", "after"), rows)


def _losses(report: Mapping[str, Any]) -> Chart:
    series = [Series("training", report["losses"], 1), Series("held-out images", report["eval_losses"], 2)]
    svg = line_chart([each for each in series if each.points], x="step", y="loss", log=True)
    return Chart("Loss", "Of the batches trained on, and of images held back.", svg)


def _curves(values: Mapping[str, Any]) -> Iterable[Chart]:
    """Of a run of finetune, from its folder: what is also in its curves.png."""
    place = Path(values.get("output") or "") / METRICS
    if "best_name" not in values or not place.is_file():
        return
    lines = read_lines(place)
    for name in ("loss", *_measured(lines)):
        title = _named(name)
        series = [
            Series(told, [(line["epoch"], line[key]) for line in lines if key in line], colour)
            for told, key, colour in (("training", name, 1), ("validation", f"val_{name}", 2))
        ]
        drawn = [each for each in series if each.points]
        heading = title if name.startswith(("map", "miou")) else title[0].upper() + title[1:]
        yield Chart(heading, "Over the epochs.", line_chart(drawn, x="epoch", y=title))


def _measured(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Figures of validation but the loss."""
    return [
        n
        for n in dict.fromkeys(k.removeprefix("val_") for line in lines for k in line if k[:4] == "val_")
        if n != "loss"
    ]


def _classes(report: Mapping[str, Any]) -> Chart:
    known = sorted(report["classes"], key=lambda each: -1.0 if each["value"] is None else each["value"])
    rows = [[each["name"], str(each["count"]), number(each["value"])] for each in known]
    what = OF_CLASSES[report["task"]]
    svg = Markup("")
    if len(known) > _MATRIX:
        points = [(i + 1, each["value"]) for i, each in enumerate(known) if each["value"] is not None]
        svg = line_chart([Series(what, points, names=[each["name"] for each in known])], x="class", y=what)
    return Chart("Classes", "From the worst to the best.", svg, ("class", COUNTED[report["task"]], what), rows)


def _confusion(report: Mapping[str, Any]) -> Chart:
    names, cells = report["names"], report["confusion"]
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])[:_WORST]
    rows = [[names[true], names[predicted], str(count)] for true, predicted, count in wrong]
    numbers = sorted({number for cell in cells for number in cell[:2]})
    drawn = Markup("<p>{}</p>").format(
        f"{len(numbers)} classes are too many to draw; the commonest mistakes are below."
    )
    if len(numbers) <= _MATRIX:
        counts = {(true, predicted): count for true, predicted, count in cells}
        table = [[counts.get((i, j), 0) for j in numbers] for i in numbers]
        drawn = matrix_chart([names[number] for number in numbers], table)
    return Chart("Confusion", "A row for each true class.", drawn, ("true", "predicted", "times"), rows)


def _risk(risk: Mapping[str, Any]) -> str:
    return f"{risk['text']}: {', '.join(risk['layers'])}" if risk["layers"] else str(risk["text"])


def _told(entry: Mapping[str, Any]) -> str:
    """One thing that was done to the network since its conversion."""
    shown = {name: value for name, value in entry.items() if isinstance(value, (int, float, str)) and value != ""}
    action = shown.pop("action", "changed")
    return f"{action}: " + ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )


def _size(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f} MiB"
