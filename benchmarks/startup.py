"""Start-up time of the command line, beside the imports that it needs or must not need.

    python benchmarks/startup.py [--runs 7]

Goal: `normswap --help` at most 0.1 times `import torch`; a command's own overhead at most 5 % over its imports.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FACTORY = "from torch import nn\ndef tiny():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny.py").write_text(FACTORY)
        convert = ["-m", "normswap", "convert", "tiny.py:tiny", "--to", "gn", "--dry-run", "--quiet"]
        jobs = {
            "python": ["-c", ""],
            "import typer, rich": ["-c", "import typer, rich.console"],
            "import torch": ["-c", "import torch"],
            "import torch, torch.fx, safetensors": ["-c", "import torch, torch.fx, safetensors.torch"],
            "import torchvision": ["-c", "import torchvision"],
            "normswap --help": ["-m", "normswap", "--help"],
            "normswap norms": ["-m", "normswap", "norms"],
            "normswap convert tiny.py:tiny": convert,
        }
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(options.runs + 1):  # the first run of each warms the file cache
            for name, arguments in jobs.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=folder)
                times[name].append(time.perf_counter() - start)
    ms = {name: statistics.median(values[1:]) * 1e3 for name, values in times.items()}
    print(f"median of {options.runs} runs")
    print("| | ms | / import torch |")
    print("|---|---:|---:|")
    for name, value in ms.items():
        print(f"| {name} | {value:.0f} | {value / ms['import torch']:.2f} |")


if __name__ == "__main__":
    main()
