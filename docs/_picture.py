"""Draws the terminal picture of the README: runs the command in a terminal of fixed width and keeps what it shows.

    python docs/_picture.py

The result is docs/assets/convert.svg. Weights are random, so nothing is downloaded.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMAND = "normswap convert resnet50 --weights none --to gn --groups 32"
WIDTH = 88
TARGET = Path(__file__).parent / "assets" / "convert.svg"


def in_terminal(command: list[str], folder: str) -> str:
    """The command's stdout, with the colours it chooses on a terminal."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDTH, 0, 0))
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


def main() -> None:
    """Run the command in an empty folder and draw what it said."""
    with tempfile.TemporaryDirectory() as folder:
        shown = in_terminal([sys.executable, "-m", *COMMAND.split()], folder)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), COMMAND))
    console.print()
    console.print(Text.from_ansi(shown.rstrip()))
    TARGET.parent.mkdir(exist_ok=True)
    svg = console.export_svg(title="normswap", unique_id="convert")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # fonts from elsewhere, which few pages allow
    TARGET.write_text(svg.replace("Fira Code, monospace", "monospace"), encoding="utf-8")
    print(TARGET)


if __name__ == "__main__":
    main()
