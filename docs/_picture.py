"""Draws what commands show: runs each in a terminal of fixed width and keeps what it says.

    python docs/_picture.py [COMMAND ...]

The results are docs/assets/COMMAND.svg, which the pages in docs/commands show; convert.svg is that of the README. The
networks are one with random weights and that of `normswap demo`, so nothing is downloaded.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from _evaluating import CARD, CONVERT, EXPORT, write_digits
from rich.console import Console
from rich.text import Text

NETWORK = "normswap.demo.network:pretrained"
FILE = "digits-gn.safetensors --trust-code"
IMAGES = "--mean 0 --std 1"
COMMANDS = {
    "inspect": f"normswap inspect {NETWORK}",
    "advise": f"normswap advise {NETWORK} --batch-size 2 --input 1,1,8,8",
    "compare": f"normswap compare {NETWORK} --data digits --groups 1,2,4,8 {IMAGES}",
    "convert": "normswap convert resnet50 --weights none --to gn --groups 32",
    "verify": f"normswap verify {FILE} --data digits/test {IMAGES}",
    "calibrate": f"normswap calibrate {FILE} --data digits/train {IMAGES}",
    "distil": f"normswap distil {FILE} --data digits/train --steps 100 {IMAGES}",
    "finetune": f"normswap finetune {FILE} --data digits --epochs 2 --batch-size 8 --augment none {IMAGES}",
    "evaluate": f"normswap evaluate {FILE} --data digits/test {IMAGES}",
    "export": EXPORT,
    "card": CARD.partition(" --evaluation")[0],
    "norms": "normswap norms",
    "recipes": "normswap recipes",
    "demo": "normswap demo",
}
WIDTH = {"convert": 88, "norms": 120}
USUAL = 110
PLACE = Path(__file__).parent / "assets"


def in_terminal(command: list[str], folder: str, width: int) -> str:
    """The command's stdout, with the colours it chooses on a terminal."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment = {**kept, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=writer, stderr=subprocess.DEVNULL)
    os.close(writer)
    chunks = []
    try:
        while chunk := os.read(reader, 65536):
            chunks.append(chunk)
    except OSError:  # the terminal is closed with the process
        pass
    if process.wait() != 0:
        sys.exit(f"{' '.join(command)} failed")
    return b"".join(chunks).decode().replace("\r\n", "\n")


def draw(name: str, folder: str) -> None:
    """Run the command in the folder and draw what it says."""
    command, width = COMMANDS[name], WIDTH.get(name, USUAL)
    shown = in_terminal([sys.executable, "-m", *shlex.split(command)], folder, width)
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), command))
    console.print()
    console.print(Text.from_ansi(shown.rstrip()))
    svg = console.export_svg(title="normswap", unique_id=name)
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # fonts from elsewhere, which few pages allow
    target = PLACE / f"{name}.svg"
    target.write_text(svg.replace("Fira Code, monospace", "monospace"), encoding="utf-8")
    print(target)


def main() -> None:
    """In an empty folder with the digits and a network that was converted."""
    PLACE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder), train=20)
        subprocess.run([sys.executable, "-m", *shlex.split(CONVERT)], cwd=folder, check=True, capture_output=True)
        for name in sys.argv[1:] or COMMANDS:
            draw(name, folder)


if __name__ == "__main__":
    main()
