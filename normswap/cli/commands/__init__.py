"""One command per file: parse, call the API, render."""
