"""The file of a converted network: weights, manifest, undo."""
