"""An image file -> the picture, or why it cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .preprocess import canonical

if TYPE_CHECKING:
    from PIL.Image import Image


class Unreadable(Exception):
    """A file or sample that is broken in itself, and why; whoever reads many of them names it and counts it."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(reason)
        self.name = name


def decode(file: Path) -> Image:
    """The picture in one of the modes of `canonical`. Raises `Unreadable`, with the reason in a few words."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return canonical(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        raise Unreadable(reason_of(error, file)) from error


def reason_of(error: Exception, file: Path) -> str:
    """Why a file could not be read, in the decoder's words without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0].replace(f" {str(file)!r}", "")
