"""A training step of ResNet-50 on a GPU: BN, frozen BN and GroupNorm, in several settings. Time and peak memory.

    python benchmarks/gpu.py [--batch 2 8 32] [--precision bf16] [--settings eager graphs] [--json]

Random weights and images of 224 x 224: neither changes the time. A step is forward, backward, clipping and SGD with
momentum; the median of `--steps` steps after a warm-up, timed by CUDA events, each combination in a process of its own,
so that peak memory is its own. `graphs` is `torch.compile(mode="reduce-overhead")`, which replays CUDA graphs. The last
columns are GN's time and memory as multiples of BN's in the same setting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import normswap

NORMS = ("bn", "frozen", "gn")
SETTINGS = ("eager", "channels_last", "compiled", "compiled+channels_last", "graphs", "graphs+channels_last")
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def network(norm: str, name: str) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    if norm == "bn":
        return model
    return normswap.convert(model, norm, groups=32 if norm == "gn" else None, indivisible="nearest")


def measure(norm: str, setting: str, batch: int, precision: str, steps: int, name: str, size: int) -> dict[str, float]:
    """Median milliseconds of a step, and MiB at the peak."""
    device = torch.device("cuda")
    model = network(norm, name).to(device).train()
    x, y = torch.randn(batch, 3, size, size, device=device), torch.randint(1000, (batch,), device=device)
    if "channels_last" in setting:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    forward: Any = model
    if setting.startswith(("compiled", "graphs")):
        forward = torch.compile(model, mode="reduce-overhead" if setting.startswith("graphs") else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)

    def step() -> None:
        with torch.autocast("cuda", dtype=DTYPES[precision], enabled=DTYPES[precision] is not None):
            loss = F.cross_entropy(forward(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(10):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return {"ms": statistics.median(times), "mib": torch.cuda.max_memory_allocated() / 2**20}


def apart(options: argparse.Namespace, norm: str, setting: str, batch: int) -> dict[str, float] | None:
    """The same in a process of its own; None when it failed, for example for want of memory."""
    job = json.dumps([norm, setting, batch, options.precision, options.steps, options.network, options.size])
    ran = subprocess.run([sys.executable, __file__, "--job", job], capture_output=True, text=True)
    if ran.returncode:
        print(f"  {norm}, {setting}, batch {batch}: {ran.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def shown(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['ms']:.2f} ms, {found['mib']:.0f} MiB"


def ratio(gn: dict[str, float] | None, bn: dict[str, float] | None) -> str:
    return "- | -" if gn is None or bn is None else f"{gn['ms'] / bn['ms']:.3f} | {gn['mib'] / bn['mib']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", action="store_true", help="one JSON object a line in place of the table")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(*json.loads(options.job))))
        return
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here")
    if not options.json:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
              f"{options.network}, {options.size} px, {options.precision}\n")  # fmt: skip
        print("| batch | setting | BN | frozen BN | GN | GN time / BN | GN memory / BN |")
        print("|---:|---|---:|---:|---:|---:|---:|", flush=True)
    for batch in options.batch:
        for setting in options.settings:
            found = {norm: apart(options, norm, setting, batch) for norm in NORMS}
            if options.json:
                print(json.dumps({"batch": batch, "setting": setting, **found}), flush=True)
                continue
            cells = " | ".join(shown(found[norm]) for norm in NORMS)
            print(f"| {batch} | {setting} | {cells} | {ratio(found['gn'], found['bn'])} |", flush=True)


if __name__ == "__main__":
    main()
