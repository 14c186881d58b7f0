"""Draws the picture of docs/reports.md: a report of `normswap verify` on handwritten digits, on a phone.

    python docs/_report.py

Writes docs/assets/report.png. Needs chromium.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _evaluating import CONVERT, write_digits
from PIL import Image

TARGET = Path(__file__).parent / "assets" / "report.png"
VERIFY = "normswap verify digits-gn.safetensors --trust-code --data digits/test --mean 0 --std 1 --report report.html"
WIDTH, HEIGHT = 390, 1180
LOOKS = {"light": "--blink-settings=preferredColorScheme=1", "dark": "--blink-settings=preferredColorScheme=0"}


def main() -> None:
    """In an empty folder: the report, twice photographed, side by side."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("this needs chromium")
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder))
        for command in (CONVERT, VERIFY):
            subprocess.run([sys.executable, "-m", *shlex.split(command)], cwd=folder, check=True, capture_output=True)
        for name, option in LOOKS.items():
            ask = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", option]
            ask += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={name}.png", f"file://{folder}/report.html"]
            subprocess.run(ask, cwd=folder, check=True, capture_output=True)
        both = Image.new("RGB", (2 * WIDTH + 20, HEIGHT), "white")
        for number, name in enumerate(LOOKS):
            with Image.open(Path(folder, f"{name}.png")) as picture:
                both.paste(picture.crop((0, 0, WIDTH, HEIGHT)), (number * (WIDTH + 20), 0))
        both.save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
