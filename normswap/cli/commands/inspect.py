"""`normswap inspect`: every norm layer of a network, and whether its statistics can be folded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...display.overview import layers_table
from ..arguments import options
from ..arguments.inputs import example_inputs, given_inputs
from ..arguments.networks import ResolvedSource, SourceRequest, locate, on_device, open_network
from ..terminal.output import reporting

if TYPE_CHECKING:
    from ...inspection.inventory import Inventory
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
    device: options.Device = "auto",
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
    given = given_inputs(ctx, input_shape)
    with reporting(ctx) as out:
        wanted = SourceRequest.of(ctx, source)
        out.step("loading PyTorch")
        from ...inspection import inventory
        from ...planning.rules import assigned, rules_of, selected

        rules = rules_of(None, pairs) if pairs else []
        origin = locate(ctx, wanted, default_weights="none")
        model, origin = open_network(origin, wanted, out, values=bool(given), warn=False)
        out.step("looking for norms")
        with on_device(device, model) if given else nullcontext():
            found = inventory.inspect(model, example_inputs(model, given))
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
        rule = {path: chosen.target for path, chosen in matched.chosen.items()} if matched.rules else None
        table = layers_table(found.layers, rule=rule, show_all=show_all)
        page.table(table.columns, table.rows)
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
