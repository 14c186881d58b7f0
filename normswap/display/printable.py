"""Names come from files and from strangers: what of them can be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with control characters escaped."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
