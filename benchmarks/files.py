"""File to file: time and peak memory of converting a checkpoint, side by side with doing it by hand.

    python benchmarks/files.py [--runs 5] [--model resnet50]

Each run is a process of its own; imports are left out of the time, and included in the peak. `by hand` builds the
network, `torch.load`s, swaps with the shortest loop and saves; `meta` builds it on the meta device and memory-maps.
Goal: at most 1.3 times `meta`; peak at most the imports' plus the file's size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PREAMBLE = """
import json, resource, sys, time
import torch, torchvision, safetensors.torch
from torch import nn
model_name, source, out = sys.argv[1:4]
def loop(model):
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            norm = nn.GroupNorm(1, child.num_features)
            norm.weight, norm.bias = child.weight, child.bias
            setattr(model, name, norm)
        else:
            loop(child)
"""
REPORT = """
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([(time.perf_counter() - start) * 1e3, peak]))
"""
JOBS = {
    "imports alone": "start = time.perf_counter()",
    "by hand": """
start = time.perf_counter()
model = torchvision.models.get_model(model_name, weights=None)
model.load_state_dict(torch.load(source + ".pth", weights_only=True))
loop(model)
safetensors.torch.save_file(model.state_dict(), out)
""",
    "meta": """
start = time.perf_counter()
with torch.device("meta"):
    model = torchvision.models.get_model(model_name, weights=None)
model.load_state_dict(safetensors.torch.load_file(source + ".safetensors"), assign=True)
loop(model)
safetensors.torch.save_file(model.state_dict(), out)
""",
}
for transfer in ("copy", "fold"):
    JOBS[f"normswap {transfer}"] = f"""
import normswap
from normswap import checkpoint, conversion, recognise, sources, transfer, undo
start = time.perf_counter()
found = sources.parse(model_name)
model, found = sources.build(found, source + ".safetensors")
model = normswap.convert(model, "gn", groups=1, transfer="{transfer}", inplace=True, check=False, undo=False)
model._normswap.source = found.to_dict()
normswap.save(model, out, overwrite=True)
"""
JOBS["normswap fold, undo"] = JOBS["normswap fold"].replace(", undo=False", "")
JOBS["normswap fold, undo, self-check"] = JOBS["normswap fold, undo"].replace(", check=False", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", default="resnet50")
    options = parser.parse_args()
    import safetensors.torch
    import torch
    from torchvision.models import get_model

    with tempfile.TemporaryDirectory() as folder:
        source = str(Path(folder) / "weights")
        state = get_model(options.model, weights=None).state_dict()
        torch.save(state, source + ".pth")
        safetensors.torch.save_file(state, source + ".safetensors")
        out = str(Path(folder) / "out.safetensors")
        size = Path(source + ".safetensors").stat().st_size / 2**20
        results: dict[str, list[list[float]]] = {name: [] for name in JOBS}
        for _ in range(options.runs):
            for name, job in JOBS.items():
                command = [sys.executable, "-c", PREAMBLE + job + REPORT, options.model, source, out]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                results[name].append(json.loads(done.stdout))
    ms = {name: statistics.median(r[0] for r in runs) for name, runs in results.items()}
    peak = {name: statistics.median(r[1] for r in runs) for name, runs in results.items()}
    print(f"torch {torch.__version__}, {options.model}, file of {size:.0f} MiB, median of {options.runs} runs")
    print("| | ms | / meta | peak MiB | (peak - imports) / file |")
    print("|---|---:|---:|---:|---:|")
    for name in JOBS:
        over = (peak[name] - peak["imports alone"]) / size
        print(f"| {name} | {ms[name]:.0f} | {ms[name] / ms['meta']:.2f} | {peak[name]:.0f} | {over:.2f} |")


if __name__ == "__main__":
    main()
