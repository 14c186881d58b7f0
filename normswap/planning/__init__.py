"""What to do with each norm, as data."""
