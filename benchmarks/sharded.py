"""What converting shards holds in memory, against the largest shard and the total.

    python benchmarks/sharded.py [--shard 350MB] [--shards 1 3 10] [--folder .]

Makes checkpoints of so many shards, of a plain network of convolutions and BatchNorm with random values, and converts
each with the command line, in a process of its own: shards to shards, and (`in one piece`) shards to one file. `peak`
is the most memory that was resident in that process (`ru_maxrss`: mapped files count); `base` the same for a network
of a single small block, which is the interpreter, the libraries and the run of the self-check. In one piece are only
totals up to 1 GB, since several times that is held. Needs three times the largest checkpoint on the disk of --folder,
and removes what it has made.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from normswap.files.sharding import INDEX, parse_size

NETS = """
from torch import nn


def build(blocks=1, width=8):
    layers = []
    for i in range(blocks):
        conv = nn.Conv2d(3 if i == 0 else width, width, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
"""
RUN = """
import resource, sys
from normswap.__main__ import main
try:
    main()
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def checkpoint(folder: Path, blocks: int, width: int, shard: int) -> tuple[int, int]:
    """Write a checkpoint of nets.build, a shard at a time. Returns the bytes of the largest shard, and of all."""
    folder.mkdir()
    sys.path.insert(0, str(folder.parent))
    from nets import build

    with torch.device("meta"):
        state = build(blocks, width).state_dict()
    generator = torch.Generator().manual_seed(0)
    parts: list[dict[str, torch.Tensor]] = [{}]
    places, sizes = {}, [0]
    files = iter(f"model-{i:05}.safetensors" for i in range(1, 10**5))
    file = next(files)
    for name, meta in state.items():
        if sizes[-1] + meta.nbytes > shard and parts[-1]:
            save_file(parts.pop(), folder / file)
            parts, file = [{}], next(files)
            sizes.append(0)
        parts[-1][name] = _values(name, meta, generator)
        places[name] = file
        sizes[-1] += meta.nbytes
    save_file(parts.pop(), folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": places}))
    return max(sizes), sum(sizes)


def _values(name: str, meta: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random, of a size that keeps signals as they are through many layers."""
    if not meta.is_floating_point():
        return torch.full(meta.shape, 100, dtype=meta.dtype)
    if meta.dim() > 1:
        fan_in = meta[0].numel()
        return torch.randn(meta.shape, generator=generator).mul_((2 / fan_in) ** 0.5)
    if name.endswith("running_var"):
        return torch.rand(meta.shape, generator=generator).add_(0.5)
    return torch.randn(meta.shape, generator=generator).mul_(0.1).add_(float(name.endswith("weight")))


def converted(folder: Path, blocks: int, width: int, *more: str) -> tuple[int, float]:
    """Peak in bytes and seconds of `normswap convert`, from folder/w."""
    args = ["convert", f"{folder / 'nets.py'}:build", "--arg", f"blocks={blocks}", "--arg", f"width={width}"]
    args += ["--weights", str(folder / "w"), "--to", "gn", "--groups", "4", "--input", "1,3,8,8", "--quiet", *more]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", RUN, *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return 1024 * int(done.stderr.rpartition("peak ")[2].split()[0]), time.perf_counter() - start


def measured(place: Path, shards: int, shard: int, width: int, whole: bool) -> tuple[int, int, int, float, int]:
    """Largest shard, total, peak and seconds of shards to shards, peak of shards to one file (0: not asked for)."""
    with tempfile.TemporaryDirectory(prefix="normswap-sharded-", dir=place) as name:
        folder = Path(name)
        (folder / "nets.py").write_text(NETS)
        blocks = max(1, shards * (shard // (9 * width * width * 4)))
        largest, total = checkpoint(folder / "w", blocks, width, shard)
        gc.collect()
        out = folder / "out"
        peak, seconds = converted(folder, blocks, width, "--max-shard-size", f"{largest}B", "-o", str(out))
        shutil.rmtree(out)
        whole = whole and total < 10**9
        one = converted(folder, blocks, width, "-o", str(folder / "one.safetensors"))[0] if whole else 0
        return largest, total, peak, seconds, one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shard", default="350MB", type=parse_size)
    parser.add_argument("--shards", default=[1, 3, 10], type=int, nargs="+")
    parser.add_argument("--width", default=1024, type=int, help="channels of each convolution")
    parser.add_argument("--folder", default=Path(), type=Path, help="where there is room")
    parser.add_argument("--json", action="store_true", help="the last total's figures alone, in bytes, as JSON")
    args = parser.parse_args()
    base = measured(args.folder, 1, 1, 8, whole=False)[2]
    if args.json:
        largest, total, peak, _, _ = measured(args.folder, args.shards[-1], args.shard, args.width, whole=False)
        print(json.dumps({"base": base, "largest": largest, "total": total, "peak": peak}))
        return
    print(f"base {base / 1e6:.0f} MB, channels {args.width}\n")
    print("| total, MB | largest shard, MB | peak - base, MB | / largest | / total | in one piece / total | s |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for shards in args.shards:
        largest, total, peak, seconds, one = measured(args.folder, shards, args.shard, args.width, whole=True)
        above, whole = peak - base, f"{(one - base) / total:.2f}" if one else ""
        cells = [f"{total / 1e6:.0f}", f"{largest / 1e6:.0f}", f"{above / 1e6:.0f}", f"{above / largest:.2f}"]
        cells += [f"{above / total:.2f}", whole, f"{seconds:.0f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
