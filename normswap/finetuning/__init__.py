"""Train a converted network on labelled images, at small batches."""
