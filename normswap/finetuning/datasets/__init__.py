"""Training and validation data of each task."""
