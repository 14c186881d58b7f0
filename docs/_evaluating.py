"""Runs the commands of docs/evaluating.md and docs/sharing.md on the digits of `normswap demo`; shows what they say.

    python docs/_evaluating.py

Writes docs/assets/confusion.png.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from PIL import Image

from normswap.demo.digits import split

TARGET = Path(__file__).parent / "assets" / "confusion.png"
CONVERT = "normswap convert normswap.demo.network:pretrained --to gn --groups 4 -o digits-gn.safetensors"
ASK = "normswap evaluate digits-gn.safetensors --trust-code --data digits/test --mean 0 --std 1"
CARD = "normswap card digits-gn.safetensors --license apache-2.0 --evaluation all.json"
EXPORT = "normswap export digits-gn.safetensors --trust-code --to onnx --input 1,1,8,8"


def write_digits(folder: Path, *, train: int = 0) -> None:
    """The held-out digits as `digits/test/<class>/<number>.png`, and of the others `train` of each class."""
    others, test = split()
    for part, digits, most in (("train", others, train), ("test", test, len(test.labels))):
        seen: Counter[int] = Counter()
        for number, (image, label) in enumerate(zip(digits.images, digits.labels.tolist(), strict=True)):
            seen[label] += 1
            if seen[label] <= most:
                place = folder / "digits" / part / str(label)
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray((image[0] * 255).round().byte().numpy()).save(place / f"{number}.png")


def main() -> None:
    """In an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder))
        subprocess.run([sys.executable, "-m", *shlex.split(CONVERT)], cwd=folder, check=True, capture_output=True)
        for command in (
            ASK,
            f"{ASK} -o matrix.png --quiet",
            f"{ASK} --fail-below 0.98 --quiet",
            f"{ASK} -o all.json --quiet",
            CARD,
            EXPORT,
        ):
            done = subprocess.run(
                [sys.executable, "-m", *shlex.split(command)], cwd=folder, capture_output=True, text=True
            )
            said = done.stdout + done.stderr * ("--quiet" in command)
            print(f"$ {command}\n{said}(exit code {done.returncode})\n")
        shutil.copy(Path(folder, "matrix.png"), TARGET)


if __name__ == "__main__":
    main()
