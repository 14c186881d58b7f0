"""SOURCE -> network and weights: one file a kind of source."""
