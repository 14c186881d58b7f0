"""Web pages of what a command has found: one file, no script, nothing from elsewhere."""
