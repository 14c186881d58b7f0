"""`normswap inspect`: every norm layer of a network, and whether its statistics can be folded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..arguments import options
from ..arguments.networks import ResolvedSource, SourceRequest, example_inputs, locate, open_network
from ..terminal.output import reporting
from ..terminal.problem_lines import Run, collapse, local_names

if TYPE_CHECKING:
    from ...inspection.inventory import Inventory, Layer
    from ...planning.rules import Rule
    from ..terminal.render import Page


def inspect(
    ctx: typer.Context,
    source: options.Source,
    weights: options.Weights = None,
    arg: options.Arg = None,
    input_shape: options.Input = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=NORM",
            help="Show which layers this rule of convert matches; repeatable, the first match wins.",
            show_default=False,
        ),
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="A row for each layer, and what feeds it by name.")] = False,
    built_by: options.BuiltBy = None,
    trust_pickle: options.TrustPickle = False,
    trust_code: options.TrustCode = False,
    allow_nonfinite: options.AllowNonfinite = False,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """List every norm layer, what feeds it, and whether its statistics can be folded into that.

    The network is built without weights unless --weights asks for some; nothing is downloaded or changed.

    \b
    normswap inspect resnet50
    normswap inspect timm:mobilenetv3_small_100 --input 1,3,224,224
    normswap inspect fasterrcnn_resnet50_fpn_v2 --rule 'role:backbone=frozen' --rule 'role:head=gn'
    """
    pairs = options.rules(ctx, rule)
    shapes = options.shapes(ctx, input_shape)
    with reporting(ctx, as_json=json, quiet=quiet, verbose=verbose) as out:
        wanted = SourceRequest(
            source, weights, tuple(arg or ()), trust_pickle, trust_code, allow_nonfinite, seed, built_by
        )
        out.step("loading PyTorch")
        from ...inspection import inventory
        from ...planning.rules import assigned, rules_of, selected

        rules = rules_of(None, pairs) if pairs else []
        origin = locate(ctx, wanted, default_weights="none")
        model, origin = open_network(origin, wanted, out, values=bool(shapes), warn=False)
        out.step("looking for norms")
        found = inventory.inspect(model, example_inputs(model, shapes))
        matched = Matched(rules, assigned(found, rules, selected(found)))
        out.show(lambda: _values(origin, found, matched), lambda page: _render(page, origin, found, matched, show_all))


@dataclass(frozen=True)
class Matched:
    """The rules that were given, and the one that decides about each layer, by path."""

    rules: Sequence[Rule]
    chosen: Mapping[str, Rule]

    def to_dict(self) -> list[dict[str, Any]]:
        """JSON values."""
        layers: dict[Rule, list[str]] = {rule: [] for rule in self.rules}
        for path, rule in self.chosen.items():
            layers[rule].append(path)
        return [{"pattern": rule.pattern, "target": rule.target, "layers": layers[rule]} for rule in self.rules]


def _values(origin: ResolvedSource, found: Inventory, matched: Matched) -> dict[str, Any]:
    rules = {"rules": matched.to_dict()} if matched.rules else {}
    return {"network": origin.to_dict(), "recorded": found.recorded, **rules, **found.to_dict()}


def _render(page: Page, origin: ResolvedSource, found: Inventory, matched: Matched, show_all: bool) -> None:
    from ...errors import plural

    if found.layers:
        rule = {x.path: matched.chosen[x.path].target if x.path in matched.chosen else "" for x in found.layers}
        keys = [lambda x, key=key: (rule[x.path], *key(x)) for key in (_key, _loose_key)]
        runs = collapse(found.layers, lambda x: x.path, *keys, together=not show_all)
        roles = len({layer.role for layer in found.layers}) > 1
        given = bool(matched.rules)
        columns = ("layer", *(["role"] if roles else []), *(["rule"] if given else []),
                   *([] if show_all else [">layers"]), "type", ">channels", ">eps", "affine", "mode", "fed by",
                   "foldable")  # fmt: skip
        rows = (_row(run, show_all, roles, [rule[run.items[0].path]] if given else []) for run in runs)
        page.table(columns, rows)
    if found.suspects:
        page.gap()
        page.line(("Not known, so convert fails unless a rule keeps them:", "bad"))
        page.table(("module", "type", "why"), ((s.path or "(root)", s.class_name, s.reason) for s in found.suspects))
    page.gap()
    _summary(page, origin, found)
    for each in matched.to_dict():
        count, left = len(each["layers"]), "" if len(matched.rules) == 1 else " that an earlier rule has left"
        told = f" matches {plural(count, 'layer')}" if count else (f" matches no layer{left}", "bad")
        page.line("  ", (f"{each['pattern']}={each['target']}", "path"), told)


def _key(layer: Layer) -> tuple[Any, ...]:
    return (layer.state.channels, *_loose_key(layer))


def _loose_key(layer: Layer) -> tuple[Any, ...]:
    """What the layers of one row share; channels may then be a range."""
    state = layer.state
    groups = _groups(layer)
    fixed = (layer.role, layer.class_name, state.eps, state.affine, layer.mode, groups)
    return (*fixed, layer.feed.kind, layer.feed.foldable, local_names(layer.feed.reason, layer.path))


def _row(run: Run[Layer], show_all: bool, roles: bool, rule: Sequence[str]) -> list[str | tuple[str, str]]:
    from ..terminal import render

    first = run.items[0]
    fed_by = first.feed.kind.replace("_", " ")
    if show_all and first.feed.producers:
        fed_by += " " + ", ".join(first.feed.producers)
    known = first.feed.kind in ("conv", "conv_transpose", "linear")  # else what feeds it is the reason
    why = f": {local_names(first.feed.reason, first.path)}" if known or first.feed.kind == "other" else ""
    fold = ("yes", "good") if first.feed.foldable else (f"no{why}", "bad")
    also = f" = {', '.join(first.aliases)}" if show_all and first.aliases else ""
    return [
        ((run.name or "(root)") + also, "path"),
        *([first.role] if roles else []),
        *rule,
        *([] if show_all else [str(len(run.items))]),
        first.class_name + _groups(first),
        render.number_range(x.state.channels for x in run.items),
        f"{first.state.eps:g}",
        "yes" if first.state.affine else "no",
        first.mode,
        fed_by,
        fold if first.state.has_statistics else "no statistics",
    ]


def _groups(layer: Layer) -> str:
    from ...errors import plural

    return f" ({plural(layer.state.num_groups, 'group')})" if layer.state.num_groups else ""


def _summary(page: Page, origin: ResolvedSource, found: Inventory) -> None:
    from ...errors import plural
    from ...inspection.roles import counted

    kinds = Counter(layer.spec.name for layer in found.layers)
    with_statistics = [x for x in found.layers if x.state.has_statistics]
    parts = [(f"{origin}: {plural(len(found.layers), 'norm layer')}", "strong")]
    if kinds:
        parts.append((f" ({', '.join(f'{count} {name}' for name, count in kinds.items())})", ""))
    if with_statistics:
        foldable = sum(x.feed.foldable for x in with_statistics)
        rest = ", the others prescaled" if foldable < len(with_statistics) else ""
        parts.append((f"; the statistics of {foldable} of {len(with_statistics)} can be folded{rest}", ""))
    if found.suspects:
        parts.append((f"; {len(found.suspects)} suspect", "bad"))
    page.line(*parts)
    if len({layer.role for layer in found.layers}) > 1:
        page.line(
            ("Roles: ", "strong"),
            counted(layer.role for layer in found.layers),
            ("   for --rule 'role:NAME=NORM'", "dim"),
        )
    if origin.file is None and origin.weights is not None and origin.weights.digest is not None:
        page.line(("Weights: ", "strong"), str(origin.weights))
