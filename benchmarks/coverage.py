"""Convert every torchvision network with BN, and one timm network of each family that has it; print a table.

    python benchmarks/coverage.py [--only PATTERN] [--keep build/coverage.jsonl] [--write docs/coverage.md]

Each network gets random weights and randomised running statistics. For each: how many norms `inspect` finds; how many
of the layer -> norm pairs that a recorded run shows the symbolic run finds too, and how many it shows wrongly; whether
converting to gn, ln, frozen and fused leaves no BN and passes the self-check; and the largest relative output error
of frozen and fused, which must equal the original.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

import normswap
from normswap.conversion.self_check import _double as double
from normswap.conversion.self_check import observe, watched_paths
from normswap.inspection.example_inputs import guess_inputs
from normswap.inspection.inventory import Layer
from normswap.modules.tree import aliases
from normswap.sources.resolve import build, build_empty, parse
from normswap.sources.torchvision import names
from normswap.tracing.calls import KnownModules
from normswap.tracing.feeds import Feed, analyse
from normswap.tracing.recorded import record

warnings.filterwarnings("ignore")
TARGETS = ("gn", "ln", "frozen", "fused")

# One network of each timm family whose default norm is a BN; the smallest of the family.
TIMM = """
resnet18 resnet26d resnext26ts resnetv2_50x1_bit seresnet50 wide_resnet50_2 gcresnet33ts ecaresnet26t ese_vovnet19b_dw
eca_botnext26ts_256 bat_resnext26ts halonet26t lambda_resnet26t lamhalobotnet50ts_256 sehalonet33ts cs3darknet_s
cspresnet50 darknet53 densenet121 dla34 dpn68 efficientnet_b0 efficientnet_lite0 tf_efficientnet_b0
tf_efficientnetv2_b0 efficientnet_es mixnet_s tf_mixnet_s mnasnet_small mobilenetv2_050 mobilenetv3_small_050
tf_mobilenetv3_small_075 mobilenetv4_conv_small_050 fbnetc_100 fbnetv3_b hardcorenas_a spnasnet_100 semnasnet_050
tinynet_e rexnet_100 rexnetr_200 lcnet_050 ghostnet_050 ghostnetv2_100 hrnet_w18_small inception_v3 inception_v4
inception_resnet_v2 inception_next_atto legacy_senet154 legacy_seresnet18 legacy_xception nasnetalarge pnasnet5large
regnetx_002 regnety_002 regnetv_040 regnetz_c16 repvgg_a0 mobileone_s0 repghostnet_050 repvit_m0_9 res2net50_14w_8s
resnest14d selecsls42 skresnet18 vgg11_bn vovnet39a xception41 xception41p gernet_s
hgnet_tiny hgnetv2_b0 fastvit_t8 levit_128s levit_conv_128s mobilevit_xxs mobilevitv2_050 edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 tiny_vit_5m_224 visformer_tiny convmixer_768_32
coat_tiny coatnet_nano_rw_224 maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256 crossvit_9_dagger_240
poolformer_s12 pvt_v2_b0 twins_svt_small nest_tiny fasternet_t0 starnet_s1 shvit_s1 swiftformer_xs mambaout_femto
rdnet_tiny test_resnet test_efficientnet csatv2 focalnet_tiny_srf ese_vovnet39b ghostnetv3_050
""".split()


@dataclass
class Row:
    """One network's results."""

    name: str
    norms: int = 0
    folded: int = 0
    prescaled: int = 0
    pairs: int = 0
    found: int = 0
    wrong: int = 0
    worst_check: float = 0.0
    worst_exact: float = 0.0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def randomise_statistics(model: nn.Module) -> None:
    """Running statistics and gamma, beta that are nothing special, from a fixed seed."""
    generator = torch.Generator().manual_seed(1)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.copy_(uniform(module.running_mean, -0.2, 0.2))
                module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))
                if getattr(module, "weight", None) is not None:
                    module.weight.copy_(uniform(module.weight, 0.6, 1.4))
                if getattr(module, "bias", None) is not None:
                    module.bias.copy_(uniform(module.bias, -0.2, 0.2))


def batch_norms(inventory: normswap.Inventory) -> dict[str, Layer]:
    return {x.path: x for x in inventory.layers if x.spec.needs_statistics}


def recorded_feeds(model: nn.Module, layers: dict[str, Layer], inputs: tuple[object, ...]) -> dict[str, Feed]:
    """What a recorded run alone shows to feed each of the norms."""
    known = KnownModules(aliases(model), {path: layer.state.channels for path, layer in layers.items()})
    return analyse(known, [record(model, inputs, known.watched)])


def examine(name: str) -> Row | None:
    """All checks of one network; None if it has no BN."""
    start, row = time.perf_counter(), Row(name)
    source = parse(name)
    if not batch_norms(normswap.inspect(build_empty(source), feeds=False)):
        return None
    torch.manual_seed(0)
    model = build(source, "none")[0].eval()
    randomise_statistics(model)
    if hasattr(getattr(model, "transform", None), "min_size"):  # a detector would enlarge the small test image
        model.transform.min_size = (160,)
    inputs = guess_inputs(model)
    if inputs is None:
        row.problems.append("no input known")
    symbolic = batch_norms(normswap.inspect(model))
    row.norms = len(symbolic)
    recorded = recorded_feeds(model, symbolic, inputs) if inputs else {p: x.feed for p, x in symbolic.items()}
    row.pairs = sum(feed.foldable for feed in recorded.values())
    row.found = sum(feed.foldable and symbolic[p].feed.producers == feed.producers for p, feed in recorded.items())
    row.wrong = sum(
        x.feed.foldable and recorded[p].kind != "unknown" and recorded[p].producers != x.feed.producers
        for p, x in symbolic.items()
    )
    for target in TARGETS:
        try:
            convert_one(model, target, inputs, row)
        except normswap.NormswapError as error:
            row.problems.append(f"{target}: {error.message.splitlines()[0]}")
        gc.collect()
    row.seconds = time.perf_counter() - start
    return row


def convert_one(model: nn.Module, target: str, inputs: object, row: Row) -> None:
    plan = normswap.plan(model, target)
    if target == "gn":
        row.folded = sum(s.transfer == "fold" for s in plan.steps)
        row.prescaled = sum(s.transfer == "prescale" for s in plan.steps)
    converted = normswap.convert(model, using=plan, example_inputs=inputs)
    left = batch_norms(normswap.inspect(converted, feeds=False))
    if target != "frozen" and left:
        row.problems.append(f"{target}: {len(left)} BN left")
    elif any(x.spec.name != "frozen" for x in left.values()):
        row.problems.append("frozen: BN left")
    check = converted._normswap.check
    if check.error is None:
        row.problems.append(f"{target}: not checked: {check.reason}")
    else:
        row.worst_check = max(row.worst_check, check.error)
    if target in ("frozen", "fused") and inputs is not None:
        error = output_error(model, converted, plan, inputs)
        if error > 1e-4:  # random weights can blow rounding up; float64 tells it from a real difference
            wide = copy.deepcopy(model).double()
            converted = normswap.convert(wide, using=plan, check=False)
            error = output_error(wide, converted, plan, double(inputs))
        row.worst_exact = max(row.worst_exact, error)


def output_error(model: nn.Module, converted: nn.Module, plan: normswap.Plan, inputs: object) -> float:
    """Largest relative error over what the two networks put out; for detectors, over their heads' layers."""
    heads = [path for path in watched_paths(model, plan) if path not in {step.path for step in plan.steps}]
    before, after = (observe(m, inputs, heads) for m in (model, converted))
    places = ["(output)"] if "(output)" in before else heads
    pairs = [(a, b) for place in places for a, b in zip(before.get(place, []), after.get(place, []), strict=True)]
    return max((float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in pairs if a.numel()), default=0.0)


def chosen(only: str | None) -> list[str]:
    everything = [*names(), *(f"timm:{n}" for n in TIMM)]
    return [n for n in everything if only is None or fnmatch.fnmatch(n, only)]


def table(rows: list[Row]) -> str:
    lines = [
        "| network | BN | folded | prescaled | pairs found | wrong | self-check | frozen, fused | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {r.name} | {r.norms} | {r.folded} | {r.prescaled} | {r.found}/{r.pairs} | {r.wrong} | "
        f"{r.worst_check:.1e} | {r.worst_exact:.1e} | {'; '.join(r.problems)} |"
        for r in rows
    ]
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    found, pairs, wrong = (sum(getattr(r, k) for r in rows) for k in ("found", "pairs", "wrong"))
    timm = sum(r.name.startswith("timm:") for r in rows)
    return (
        f"{len(rows)} networks with BN ({len(rows) - timm} of torchvision, {timm} of timm), "
        f"{sum(r.norms for r in rows)} norms; {found} of {pairs} pairs found without inputs "
        f"({found / max(pairs, 1):.2%}), {wrong} wrong; {sum(bool(r.problems) for r in rows)} with problems."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="shell pattern over names, such as 'timm:res*'")
    parser.add_argument("--keep", type=Path, help="file of results; networks in it are not run again")
    parser.add_argument("--write", type=Path, help="file whose part between coverage marks is replaced")
    options = parser.parse_args()
    rows = []
    kept = options.keep.read_text().splitlines() if options.keep and options.keep.exists() else []
    done = {row.name: row for row in (Row(**json.loads(line)) for line in kept)}
    for name in chosen(options.only):
        if name in done:
            rows.append(done[name])
            continue
        try:
            row = examine(name)
        except Exception as error:  # a benchmark reports every network, also one that breaks
            row = Row(name, problems=[f"{type(error).__name__}: {str(error)[:120]}"])
        if row is not None:
            rows.append(row)
            if options.keep:
                with options.keep.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
            print(table([row]).splitlines()[-1], f"{row.seconds:.1f} s", file=sys.stderr, flush=True)
    text = f"{summary(rows)}\n\n{table(rows)}"
    print(text)
    if options.write:
        begin, end = "<!-- coverage:begin -->", "<!-- coverage:end -->"
        page = options.write.read_text()
        head, tail = page.partition(begin)[0], page.partition(end)[2]
        options.write.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")


if __name__ == "__main__":
    main()
