"""Texts of strangers in a CSV file, which a spreadsheet would take for formulas."""

from __future__ import annotations

from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def cell(value: Any) -> Any:
    """A text that begins as a formula does gets an apostrophe, which spreadsheets take for "text"; numbers stay.

    Source: https://owasp.org/www-community/attacks/CSV_Injection.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
