"""The module tree: walking it with all its names, replacing in it, running it without a trace, hooks."""
