"""One network on labelled data."""
